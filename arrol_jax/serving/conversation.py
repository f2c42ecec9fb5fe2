"""What is said in a terminal: lines become prompts as a run's problems did, and a vote's answers a table."""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax.pruning.table import Calibration, posterior
from arrol_jax.serving import prompts, votes
from arrol_jax.serving.calls import Piece
from arrol_jax.serving.openai_api import Limits

SHOWN = 60  # characters of an answer


class TooLong(Exception):
  """A conversation that the model has no room for."""


class Conversation:
  """Messages so far, in the model's chat template; without chat each line is a prompt of its own."""

  def __init__(self, limits: Limits, chat: bool, template: str, system: str | None):
    self.limits, self.chat, self.template = limits, chat, template
    self.first = [] if system is None else [{"role": "system", "content": system}]
    self.clear()

  def clear(self) -> None:
    self.messages = list(self.first)

  def ask(self, line: str) -> np.ndarray:
    """The prompt's tokens, i32[L]. Raises TooLong, and Refused where the chat template or the tokenizer does; the line is not
    kept then."""
    text = self.template.replace("{problem}", line)
    messages = [*self.messages, {"role": "user", "content": text}]
    most, characters = self.limits.max_prompt, sum(len(m["content"]) for m in messages) if self.chat else len(text)
    if characters > most * self.limits.longest:
      raise TooLong(self._too_long(f"{characters:,} characters"))
    tokens = prompts.chat(messages, self.limits) if self.chat else prompts.plain(text, self.limits, "the line")
    if not 0 < len(tokens) <= most:
      raise TooLong(self._too_long(f"{len(tokens):,} tokens"))
    self.messages = messages
    return np.asarray(tokens, np.int32)

  def _too_long(self, size: str) -> str:
    what, remedy = ("conversation", "; /reset begins a new one") if len(self.messages) > len(self.first) else ("line", "")
    return f"the {what} has {size} and at most {self.limits.max_prompt:,} tokens fit{remedy}"

  def answer(self, text: str | None) -> None:
    """Keeps what was replied; None: nothing was, and the question is forgotten."""
    if text is None:
      self.messages.pop()
    else:
      self.messages.append({"role": "assistant", "content": text})


def ballot(texts: list[str], last: list[Piece], limits: Limits, tables: Calibration | None,
           ask: Callable | None) -> tuple[list[str], int]:
  """Lines that tell a vote, and the trace that it chose: each trace's answer with the head's score and posterior of its last
  token, then the chosen text. By rank of the score where there is a head, else by majority."""
  vote = votes.tally("quality" if limits.scored else "majority", texts, last, limits.pattern, limits.window, ask)
  final = np.array([piece.rollout.final for piece in last], np.float32)
  chance = np.full(len(last), np.nan)
  if tables is not None:
    chance = np.asarray(posterior(jax.tree.map(lambda x: jnp.atleast_2d(x)[-1], tables), final))
  number = lambda x, form: "" if math.isnan(x) else format(x, form)
  rows = [["", "answer", "score", "posterior", "weight", "tokens"]]
  for i in sorted(range(len(last)), key=lambda i: -vote.weights[i]):
    said = "(none)" if vote.answers[i] is None else " ".join(vote.answers[i].split())
    said = said if len(said) <= SHOWN else said[:SHOWN - 1] + "…"
    rows.append(["*" if i == vote.chosen else "", said, number(final[i], "+.2f"), number(chance[i], ".2f"),
                 f"{vote.weights[i]:.2f}", str(len(last[i].rollout.tokens))])
  rows = [[cell for cell, column in zip(row, zip(*rows)) if any(column[1:])] for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows)]
  table = ["  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows]
  told = "no answer was found; the heaviest trace says" if vote.answer is None else \
    f"{vote.answer} has {100 * vote.weight:.0f}% of the weight; its heaviest trace says"
  return [*table, f"{told}:", texts[vote.chosen]], vote.chosen


def printable(text: str) -> str:
  """The text without what a terminal would obey: control characters as symbols."""
  symbol = lambda c: chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else \
    "\ufffd" if 127 <= ord(c) < 160 or "\ud800" <= c <= "\udfff" else c
  return "".join(map(symbol, text))
