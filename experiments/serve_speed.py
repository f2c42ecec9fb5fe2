"""What serving costs beside the bare engine, on one device: throughput, waiting, the deterministic mode, votes that stop early.

  python -m experiments.serve_speed --config=gsm8k_qwen05b --config.model.path=DIR/model.gguf --problems=DIR/gsm8k_test.jsonl \\
                                    [--workdir=RUN] --out=FILE            # at most five minutes on one H100
  python -m experiments.serve_speed --config=quickstart --at_once=4,8 --calls=2 --max_tokens=16 --config.rollout.slots=8   # a CPU

One process holds the model: the bare engine runs first, then the server over the same engine, with the HTTP side in processes of
its own as in arrol-serve, whose calls come from others. Both get the same prompts, lengths (ignore_eos) and seeds in the
same order, with at most --at_once of them running. A JSON line a case:
  bare, served     tokens a second; of the served the share of the bare engine's, first tokens, time between tokens, seconds of
                   compiling by jax's own count (none is expected); the same again; all of it by --http_processes
  lone             one call after another: time to the first token, and between tokens; beside it the bare engine with one slot:
                   a prefill, a decode step, and a first token's bound, a prefill and three steps
  deterministic    the same server with --deterministic: tokens a second, and seeded texts alone and in a crowd
  vote             N = 16 on the problems, also stopping early: accuracy, tokens, seconds (needs a quality head: --workdir)
What --seconds leave no time for is said to be skipped. Nothing is downloaded.
"""

from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import json
from pathlib import Path
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np

from arrol_jax import assemble, config as configuration, grade, serve
from arrol_jax.engine.scheduler import Request
from arrol_jax.running import hosts
from arrol_jax.serving import openai_api
from arrol_jax.serving.calls import Call, seed_of
from arrol_jax.serving.fields import Refused
from arrol_jax.serving.front import Front, processes_here
from arrol_jax.serving.service import Service
from arrol_jax.serving.web import ANYONE
from arrol_jax.types import UserError
from experiments.serve_load import quantile

FLAGS = {"out": ("", "a file for the lines, besides stdout"), "problems": ("", "JSON lines with a problem and an answer"),
         "at_once": ("64,256", "calls at once"), "calls": ("4", "times as many in all"),
         "max_tokens": ("256", "of the longest text"),
         "http_processes": ("0", "that speak HTTP, one number after another; 0: as arrol-serve has them here"),
         "votes": ("64", "problems to vote on"), "stop_below": ("0.2", "posterior below which a trace ends early"),
         "seconds": ("270", "after which no further case begins")}
N = 16
SHORT = 8  # decode steps of a segment where one call is timed
FEW = 16  # calls that the lone caller makes


class Bench:
  """A loaded model, and where the lines go."""

  def __init__(self, c, flags):
    self.c, self.flags, self.start, self.lines, self.compiling = c, flags, time.monotonic(), [], hosts.Compiling()
    self.at_once = [int(n) for n in flags.at_once.split(",")]
    self.processes = [int(n) or processes_here() for n in flags.http_processes.split(",")]
    self.service, self.limits = serve.load(c, flags.workdir if flags["workdir"].present else None, 4 * max(self.at_once))
    self.problems = [x for x in problems(flags.problems) if self.fits(x["problem"])]
    self.longest = min(int(flags.max_tokens), self.limits.max_new)

  def tell(self, case: str, **found) -> None:
    line = {"case": case} | {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
    line |= {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "jax": jax.__version__,
             "dtype": self.c.model.dtype, "slots": self.service.engine.rows, "at_s": round(time.monotonic() - self.start, 1)}
    print(json.dumps(line), flush=True)
    self.lines.append(line)

  def late(self, case: str) -> bool:
    """Whether there is no time for a case, which is said."""
    if time.monotonic() - self.start < float(self.flags.seconds):
      return False
    self.tell(case, skipped="no time left")
    return True

  def asking(self, problem: str) -> dict:
    """A body about a problem, as the config writes its problems."""
    text, data = self.c.data.template.replace("{problem}", problem), self.c.data
    if not data.chat:
      return {"prompt": text}
    system = [] if data.system is None else [{"role": "system", "content": data.system}]
    return {"messages": [*system, {"role": "user", "content": text}]}

  def read(self, body: dict) -> Call:
    """The server's own reading."""
    raw = json.dumps({k: v for k, v in body.items() if k != "path"}).encode()
    return openai_api.read(raw, self.c.data.chat, self.limits).calls[0]

  def fits(self, problem: str) -> bool:
    try:
      return bool(self.read(self.asking(problem)))
    except Refused:
      return False

  def body(self, i: int, **more) -> dict:
    """A call about problem i."""
    path = "/v1/chat/completions" if self.c.data.chat else "/v1/completions"
    return self.asking(self.problems[i % len(self.problems)]["problem"]) | {"path": path, "seed": i} | more

  def bodies(self, count: int) -> list[dict]:
    """Calls with lengths of their own, streamed."""
    length = np.random.default_rng(0).integers(max(1, self.longest // 4), self.longest + 1, count)
    return [self.body(i, max_tokens=int(n), ignore_eos=True, stream=True,
                      stream_options={"include_usage": True, "continuous_usage_stats": True}) for i, n in enumerate(length)]


def problems(path: str) -> list[dict]:
  """Of a file; without one, sums."""
  if not path:
    rng = np.random.default_rng(0)
    return [{"problem": "{}+{}-{}+{}>".format(*rng.integers(1, 10, 4))} for _ in range(1024)]
  try:
    return [json.loads(line) for line in Path(path).read_text().splitlines()[:2048]]
  except (OSError, ValueError) as e:
    raise UserError(f"--problems={path}: {e}") from e


def bare(b: Bench, bodies: list[dict], at_once: int) -> float:
  """Tokens a second of the engine alone with so many slots, all calls known from the start. None wants top_p."""
  s, sampling = b.service, dataclasses.replace(b.service.sampling, top_p=1.0)
  engine = dataclasses.replace(s.engine, rows=at_once, prefill_rows=min(32, at_once))
  calls = [b.read(body) for body in bodies]
  requests = [Request(seed_of(call.seed, 0), i, call.tokens, call.max_tokens, ignore_stop=True) for i, call in enumerate(calls)]
  with jax.set_mesh(engine.mesh):
    engine.warm_up(sampling)
    engine.run([r._replace(max_tokens=1) for r in requests[:at_once]], jax.random.key(0), sampling)
    start = time.monotonic()
    said = engine.run(requests, jax.random.key(0), sampling)
  return sum(len(r.tokens) for r in said) / (time.monotonic() - start)


def alone(b: Bench) -> dict:
  """Of the engine with one slot, asked directly: seconds of a prompt's prefill, and of a decode step."""
  s, sampling = b.service, dataclasses.replace(b.service.sampling, top_p=1.0)
  engine = dataclasses.replace(s.engine, rows=1, prefill_rows=1, segment=SHORT)
  calls = [b.read(body) for body in b.bodies(FEW)]

  def seconds(segments: int) -> float:
    taken = []
    for i, call in enumerate(calls):
      length, start = segments * SHORT, time.monotonic()
      engine.run([Request(seed_of(call.seed, 0), i, call.tokens, length, ignore_stop=True)], jax.random.key(0), sampling)
      taken.append(time.monotonic() - start)
    return quantile(taken[1:], 0.5)

  with jax.set_mesh(engine.mesh):
    engine.warm_up(sampling)
    step = (seconds(3) - seconds(1)) / (2 * SHORT)
    first = seconds(1) - SHORT * step
  return {"prefill_s": first, "step_s": step, "bound_s": first + 3 * step}


@contextlib.contextmanager
def serving(service: Service, limits, processes: int):
  """The server over a service, as the command has it, with the HTTP side in processes of its own: its port."""
  listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
  port = listener.getsockname()[1]
  with Front(listener, processes, sys.stderr) as front:
    service.warm_up(lambda text: print(text, file=sys.stderr, flush=True))
    thread = threading.Thread(target=front.run, args=(service, limits, ANYONE, 10.0, 60))
    thread.start()
    try:
      yield port
    finally:
      front.stop()
      thread.join(60)


def ask(port: int, bodies: list[dict], at_once: int) -> tuple[list[dict], float]:
  """The replies (serve_load.Reply as dicts) and the seconds for all of them, from as many processes as the HTTP side has where
  nobody says. Raises UserError where one went wrong."""
  callers = min(processes_here(), at_once)

  def call(i: int) -> list[dict]:
    lines = "".join(json.dumps(body) + "\n" for body in bodies[i::callers])
    command = [sys.executable, "-m", "experiments.serve_load", str(port), str((at_once - i - 1) // callers + 1)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
      raise UserError(f"the callers failed: {(done.stderr.strip().splitlines() or ['they said nothing'])[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines()]

  with ThreadPoolExecutor(callers) as pool:
    said = list(pool.map(call, range(callers)))
  replies = [said[i % callers][i // callers] for i in range(len(bodies))]
  wrong = [reply for reply in replies if reply["texts"] is None]
  if wrong:
    raise UserError(f"{len(wrong)} of {len(replies)} calls got no answer: {wrong[0]['status']} {wrong[0]['error']}")
  return replies, max(one[-1]["seconds"] for one in said)


def waits(replies: list[dict]) -> dict:
  """Times to the first token, and between tokens: a stream's after its first event, by how many they were."""
  first = [reply["times"][0] for reply in replies]
  between = [(r["times"][-1] - r["times"][0]) / (r["counts"][-1] - r["counts"][0]) for r in replies
             if r["counts"][-1] > r["counts"][0]]
  return {"first_token_s": quantile(first, 0.5), "first_token_p99_s": quantile(first, 0.99),
          "between_tokens_s": quantile(between, 0.5), "between_tokens_p99_s": quantile(between, 0.99)}


def throughput(b: Bench, port: int, case: str, at_once: int, processes: int, alone: float | None = None) -> None:
  bodies = b.bodies(at_once * int(b.flags.calls))
  b.compiling.seconds()
  ask(port, bodies[:at_once], at_once)  # warm
  warm = b.compiling.seconds()
  replies, seconds = ask(port, bodies, at_once)
  speed = sum(reply["tokens"] for reply in replies) / seconds
  share = {"of_bare": speed / alone} if alone else {}
  b.tell(case, at_once=at_once, http_processes=processes, calls=len(bodies), seconds=seconds, tokens_s=speed, **share,
         **waits(replies), compiled_before_s=warm, compiled_s=b.compiling.seconds())


def steady(b: Bench) -> None:
  """The deterministic mode's price, and whether a text is the same alone and in a crowd."""
  s, most = b.service, b.at_once[0]
  engine = dataclasses.replace(s.engine, row_buckets=1, length_buckets=1)
  service = Service(engine, s.sampling, s.tokenizer, 4 * max(b.at_once), s.voters, steady=True)
  with serving(service, b.limits, b.processes[-1]) as port:
    throughput(b, port, "deterministic", most, b.processes[-1])
    crowd = [b.body(i, max_tokens=b.longest, temperature=1.0) for i in range(max(FEW, most))]
    alone, _ = ask(port, crowd[:FEW], 1)
    together, _ = ask(port, crowd, len(crowd))
    same = sum(x["texts"] == y["texts"] for x, y in zip(alone, together, strict=False))
    b.tell("deterministic texts", alone=FEW, in_a_crowd_of=len(crowd), same=same)


def votes(b: Bench, port: int) -> None:
  """Votes by the quality head, with and without stopping hopeless traces."""
  some = [x for x in b.problems[:int(b.flags.votes)] if "answer" in x]
  if not b.limits.scored or not some:
    return b.tell("vote", skipped="no quality head (give --workdir)" if some else "the problems have no answers")
  for rule, stop in (("majority", 0.0), ("quality", 0.0), ("quality", float(b.flags.stop_below))):
    name = f"vote {rule}" + (f", stopped below {stop}" if stop else "")
    if b.late(name) or (stop and not b.limits.calibrated):
      continue
    bodies = [b.body(i, n=N, vote=rule, temperature=b.c.rollout.temperature, **({"stop_below": stop} if stop else {}))
              for i in range(len(some))]
    replies, seconds = ask(port, bodies, max(1, b.service.engine.rows // N))
    right = [grade(f"\\boxed{{{r['vote']['answer']}}}", x["answer"]) if r["vote"]["answer"] is not None else 0.0
             for r, x in zip(replies, some, strict=True)]
    ended = sum(t["finish_reason"] == "hopeless" for r in replies for t in r["vote"]["traces"])
    b.tell(name, n=N, problems=len(some), accuracy=float(np.mean(right)), seconds=seconds, stopped=ended / (N * len(some)),
           tokens_a_problem=sum(r["tokens"] for r in replies) / len(some))


def main():
  c, flags = configuration.parse(sys.argv, FLAGS, __doc__)
  serve._check(c)
  for name in ("calls", "max_tokens", "votes", "seconds"):
    configuration.whole_number(name, flags[name].value, 0, 10**6)
  b = Bench(c, flags)
  assemble.hosts.say(f"{b.limits.model}: {b.service.engine.rows} slots")
  speed = {}
  for at_once in b.at_once:
    speed[at_once] = bare(b, b.bodies(at_once * int(flags.calls)), at_once)
    b.tell("bare", at_once=at_once, calls=at_once * int(flags.calls), tokens_s=speed[at_once])
  bound = alone(b)
  again = lambda: Service(b.service.engine, b.service.sampling, b.service.tokenizer, 4 * max(b.at_once), b.service.voters)
  for i, processes in enumerate(b.processes):
    with serving(again() if i else b.service, b.limits, processes) as port:
      replies, _ = ask(port, b.bodies(FEW), 1)
      b.tell("lone", calls=FEW, http_processes=processes, **waits(replies[1:]), **bound)
      for case in ("served", "served again"):  # the first calls after the start are slower
        for at_once in b.at_once:
          b.late(case) or throughput(b, port, case, at_once, processes, speed[at_once])
  b.late("deterministic") or steady(b)
  if not b.late("vote"):
    with serving(again(), b.limits, b.processes[-1]) as port:
      votes(b, port)
  if flags.out:
    Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
    Path(flags.out).write_text("".join(json.dumps(line) + "\n" for line in b.lines))


if __name__ == "__main__":
  configuration.run(main)
