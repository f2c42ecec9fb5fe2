"""A conversation in the terminal with a run's policy, or with a model.

  arrol-chat runs/gsm8k_qwen3_06b                 # a run's policy, or its newest checkpoint where it has not ended
  arrol-chat runs/gsm8k_qwen3_06b --votes=8       # eight answers to each line, what the quality head thinks of them, their vote
  arrol-chat Qwen/Qwen3-0.6B                      # a model: a folder, a .gguf file, or an id on the hub
Lines go through data.template, the system message and the chat template as the run's prompts did;
--config.data.template={problem} leaves them as they are. /reset begins a new conversation, /quit and Ctrl-D end, Ctrl-C ends a
reply.
"""

import functools
import os
import queue
import sys
import threading

from ml_collections import ConfigDict

from arrol_jax import assemble_service, config as configuration
from arrol_jax.running.workdir import is_run, newest_checkpoint
from arrol_jax.serving.calls import Call, Piece
from arrol_jax.serving.conversation import Conversation, TooLong, ballot, printable
from arrol_jax.serving.fields import Refused
from arrol_jax.serving.service import Service
from arrol_jax.serving.votes import Sameness
from arrol_jax.types import UserError

FLAGS = {"votes": ("1", "answers to each line; above 1 they vote"),
         "temperature": ("", "0: greedy; rollout.temperature if not given"),
         "max_new": ("", "tokens of a reply at most; rollout.max_new if not given"),
         "context": ("4096", "tokens of a conversation at most, reply included, as far as the model has positions")}
WAITING = 8    # replies that were ended may still hold their rows when the next is asked for
BASE = "base"  # the config of a model that no run tells of


def main():
  argv, run = _command_line(sys.argv)
  c, flags = configuration.parse(argv, FLAGS, __doc__)
  number = lambda name, text, most: configuration.whole_number(name, text, 1, most)
  votes, context = number("votes", flags.votes, 256), number("context", flags.context, 2**20)
  most = number("max_new", flags.max_new or str(c.rollout.max_new), context - 1)
  temperature = _temperature(flags.temperature) if flags.temperature else c.rollout.temperature
  configuration.check(c, files=False, training=False)
  workdir = _weights_of(c, run) if run else None
  configuration.check_model(c)
  resize = functools.partial(_resize, c, (c.rollout.max_prompt, most, context))
  service, limits = assemble_service.load(_sized(c, votes), workdir, WAITING * votes, resize=resize)
  c.data.chat = c.data.chat or (not run and bool(limits.tokenizer.chat_template))
  _tell(f"{limits.model}: at most {limits.max_prompt} tokens of conversation and {limits.max_new} of a reply; /reset, /quit"
        + ("" if c.data.chat else "; without a chat template: each line is a prompt of its own"))
  engine = threading.Thread(target=service.serve, name="engine", daemon=True)
  engine.start()
  sameness = Sameness() if votes > 1 else None
  try:
    call = Call(None, limits.max_new, votes, temperature, c.rollout.top_p or 1.0, judged=votes > 1)
    talk(service, Conversation(limits, c.data.chat, c.data.template, c.data.system), call, sameness)
  except BrokenPipeError:  # nobody reads on; nor shall the interpreter try to, at its end
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  finally:
    service.cut()
    engine.join(10)
    sameness and sameness.close()


def talk(service: Service, conversation: Conversation, call: Call, sameness: Sameness | None) -> None:
  """Reads lines and answers them until there are no more. call: what each asks for, but for its tokens."""
  if sys.stdin.isatty():
    import readline  # noqa: F401  (lines can be edited, and earlier ones called back)
  sys.stdin.reconfigure(errors="replace")
  while (line := _read()) is not None:
    if line in ("/quit", "/exit"):
      return
    if line == "/reset":
      conversation.clear()
      print("(a new conversation)", flush=True)
    elif line.startswith("/"):
      print("(there are /reset and /quit)", flush=True)
    elif line:
      try:
        tokens = conversation.ask(line)
      except (TooLong, Refused) as e:
        print(f"({e})", flush=True)
        continue
      call = call._replace(tokens=tokens)
      conversation.answer(_stream(service, call) if call.n == 1 else _vote(service, call, conversation.limits, sameness))


def _read() -> str | None:
  """The next line; None: there is none. Ctrl-C starts the line anew."""
  while True:
    try:
      return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
      print(end="\n" if sys.stdin.isatty() else "")
      return None
    except KeyboardInterrupt:
      print("\n(/quit or Ctrl-D ends)")


def _pieces(service: Service, call: Call, on_piece) -> bool:
  """Decodes a call, on_piece(Piece) as its traces grow; False where Ctrl-C ended it."""
  told: queue.SimpleQueue = queue.SimpleQueue()
  ticket, left = service.submit(call, told.put), call.n
  try:
    while left:
      piece = told.get()
      if isinstance(piece, BaseException):
        raise piece
      on_piece(piece)
      left -= piece.finish is not None
    return True
  except KeyboardInterrupt:
    service.cancel(ticket)
    return False


def _stream(service: Service, call: Call) -> str:
  """Prints a reply as it comes, and returns it."""
  said, ends = [], []

  def on_piece(piece: Piece):
    said.append(piece.text)
    ends.append(piece.finish)
    print(printable(piece.text), end="", flush=True)

  whole = _pieces(service, call, on_piece)
  note = f" (cut off after {call.max_tokens} tokens: --max_new)" if "length" in ends else "" if whole else " (stopped)"
  print(note, flush=True)
  return "".join(said)


def _vote(service: Service, call: Call, limits, sameness: Sameness) -> str | None:
  """Prints the answers of all traces and the one that they chose, and returns it; None where Ctrl-C ended them."""
  texts, last = [""] * call.n, [None] * call.n

  def on_piece(piece: Piece):
    texts[piece.trace] += piece.text
    last[piece.trace] = piece if piece.finish else None
    if sys.stderr.isatty():
      print(f"\r{sum(map(bool, last))} of {call.n} answers", end="", file=sys.stderr, flush=True)

  whole = _pieces(service, call, on_piece)
  if sys.stderr.isatty():
    print("\r\033[K", end="", file=sys.stderr, flush=True)
  if not whole:
    print("(stopped)", flush=True)
    return None
  lines, chosen = ballot(texts, last, limits, service.voters.tables, sameness.ask)
  print(printable("\n".join(lines)), flush=True)
  return texts[chosen]


# ---- what to talk to


def _command_line(argv: list[str]) -> tuple[list[str], str | None]:
  """The command line as the config's parser takes it, and the run that it names, if it is one."""
  named = [a for a in argv[1:] if not a.startswith("-")]
  rest = [argv[0], *(a for a in argv[1:] if a.startswith("-"))]
  if {"-h", "-help", "--help"} & set(rest):
    return rest, None
  if len(named) != 1:
    raise UserError("give one run's folder or one model: arrol-chat runs/NAME or arrol-chat Qwen/Qwen3-0.6B; flags are "
                    "--NAME=VALUE")
  if is_run(named[0]):
    return [*rest, f"--workdir={named[0]}"], named[0]
  return [*rest, f"--config={BASE}", f"--config.model.path={named[0]}"], None


def _weights_of(c: ConfigDict, run: str) -> str | None:
  """Sets the model to what the run has come to; the folder of the checkpoint to take, None where policy/ is newer."""
  saved = newest_checkpoint(run)
  exported = os.path.isfile(f"{run}/policy/config.json")
  if exported and (os.path.isfile(f"{run}/summary.json") or not saved):
    c.model.path = f"{run}/policy"
    return None
  if not saved:
    raise UserError(f"{run} has saved nothing yet: a checkpoint comes every {c.checkpoint.every} steps, policy/ at its end")
  return run


def _sized(c: ConfigDict, votes: int) -> ConfigDict:
  """The config with as many rows as there are votes, and no lengths that a model could be too short for; see _resize."""
  c.rollout.slots, c.rollout.row_buckets = votes, 1
  c.rollout.max_prompt = c.rollout.max_new = 1
  c.eval.max_new = 0
  return c


def _resize(c: ConfigDict, wanted: tuple[int, int, int], positions: int) -> None:
  """A conversation's room: what the model has positions for and --context allows. wanted: tokens of a prompt at least, of a reply
  at most, of both at most; the prompt has half of the room for sure."""
  least, most, context = wanted
  room = min(context, positions)
  c.rollout.max_new = max(1, min(most, room - min(least, room // 2)))
  c.rollout.max_prompt = room - c.rollout.max_new


def _temperature(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not (value == 0 or 0.01 <= value <= 100):
    raise UserError(f"--temperature is {text!r}; it must be 0 or a number from 0.01 to 100")
  return value


def _tell(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


command = functools.partial(configuration.run, main)

if __name__ == "__main__":
  command()
