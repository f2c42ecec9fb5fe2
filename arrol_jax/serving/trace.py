"""One trace under way: tokens become text, stop strings end it, and only what can no longer change is handed out."""

import numpy as np

from arrol_jax.engine.scheduler import Sequence
from arrol_jax.serving.calls import HOPELESS, Piece, Ticket


class Text:
  """The text of tokens that grow, each decoded a few times only: behind the tokens before it, because some tokenizers drop a
  space at the start, and again where it ends within a character."""

  def __init__(self, tokenizer):
    self.decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
    self.whole, self.context, self.read = "", 0, 0  # text of the tokens before `read`, whose last began at `context`

  def of(self, tokens: list[int]) -> str:
    """The text of `tokens`, which begin with those of the call before; its end may still change where it is a half character."""
    before, now = self.decode(tokens[self.context:self.read]), self.decode(tokens[self.context:])
    text = self.whole + now[len(before):]
    if len(text) > len(self.whole) and not text.endswith("\ufffd"):  # tokens without text are no context
      self.whole, self.context, self.read = text, self.read, len(tokens)
    return text


class Trace:
  """What of a sequence's tokens was read, and how much of their text was handed out. detect: lengths of the decisions."""

  def __init__(self, ticket: Ticket, number: int, sequence: Sequence, tokenizer, detect: tuple[int, ...] = ()):
    self.ticket, self.number, self.sequence, self.detect = ticket, number, sequence, detect
    self.pieces, self.sent, self.given, self.text = 0, 0, 0, Text(tokenizer)  # given: tokens handed out
    self.told = 0.0  # when it last was
    self.tokens: list[int] = []
    self.logprobs: list[float] = []

  def read(self, ended: bool, due: bool = True) -> Piece | None:
    """What is new since the last piece; None if nothing is, or if it is not due and the trace goes on."""
    pieces, stop = self.sequence.tokens[self.pieces:], self.ticket.call.stop
    if not ended and not (pieces and (due or stop)):
      return None
    before = len(self.tokens)
    self.tokens += np.concatenate([*pieces, np.zeros(0, np.int32)]).astype(int).tolist()
    self.logprobs += np.concatenate([*self.sequence.logprobs[self.pieces:], np.zeros(0)]).tolist()
    self.pieces += len(pieces)
    rollout = self.sequence.rollout
    text, finish = self.text.decode(self.tokens) if ended else self.text.of(self.tokens), None
    if ended:
      finish = "stop" if rollout.stopped else HOPELESS if rollout.pruned else "length"
    cut = False
    if self._stop_at(text) is not None:
      text, cut, finish = *self._stop(before), "stop"
    if not (finish or due):
      return None
    end = len(text) if finish else len(text) - held(text, stop)
    new, self.sent, first, self.given = text[self.sent:end], max(self.sent, end), self.given, len(self.tokens)
    return Piece(self.number, new, self.tokens[first:], self.logprobs[first:], finish, rollout if finish else None, cut)

  def _stop(self, before: int) -> tuple[str, bool]:
    """The text up to the first stop string, and whether tokens after it had been drawn: they, and what was made of them, go."""
    drawn, rollout = len(self.tokens), self.sequence.rollout
    decode = lambda count: self.text.decode(self.tokens[:count])
    last = next(n for n in range(before, drawn + 1) if self._stop_at(decode(n)) is not None)
    text = decode(last)
    del self.tokens[last:], self.logprobs[last:]
    rollout.tokens = np.asarray(self.tokens, np.int32)
    rollout.confidences = np.concatenate(self.sequence.confidences)[:last]
    decided = sum(length <= last for length in self.detect)
    rollout.scores, rollout.posteriors = rollout.scores[:decided], rollout.posteriors[:decided]
    if last < drawn:
      rollout.final = float("nan")
    return text[:self._stop_at(text)], last < drawn

  def _stop_at(self, text: str) -> int | None:
    """Where the first stop string begins in what was not handed out, if there is one."""
    whole = settled(text)
    return min((i for i in (whole.find(s, self.sent) for s in self.ticket.call.stop) if i >= 0), default=None)


def settled(text: str) -> str:
  """A text without the U+FFFD at its end, which stand for half a character as a rule, and no stop string is to find them."""
  return text.rstrip("\ufffd")


def held(text: str, stop: tuple[str, ...]) -> int:
  """Characters at the end of an unfinished text that may still change: half a character, or the start of a stop string."""
  whole = settled(text)
  begun = max((n for s in stop for n in range(1, len(s)) if whole.endswith(s[:n])), default=0)
  return len(text) - len(whole) + begun
