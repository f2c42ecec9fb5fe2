"""Pieces of traces -> OpenAI's JSON, whole or in chunks. No HTTP here."""

import math
import time

from arrol_jax.serving.calls import HOPELESS, Likelihoods, Piece
from arrol_jax.serving.openai_api import Asked, Limits
from arrol_jax.serving.trace import Text
from arrol_jax.serving.votes import Vote


def refusal(text: str, status: int, field: str | None = None) -> dict:
  kind = "invalid_request_error" if status < 429 else "server_error" if status >= 500 else "rate_limit_error"
  return {"error": {"message": text, "type": kind, "param": field, "code": status}}


class Offsets:
  """Where in a text each of its tokens begins, in characters. A token that goes on within a character begins where that does."""

  def __init__(self, tokenizer):
    self.text, self.tokens = Text(tokenizer), []

  def add(self, tokens: list[int]) -> list[int]:
    """The offsets of the next tokens."""
    out = []
    for token in tokens:
      out.append(len(self.text.whole))
      self.tokens.append(token)
      self.text.of(self.tokens)
    return out


class Answer:
  """Pieces -> OpenAI's JSON, whole or in chunks."""

  def __init__(self, asked: Asked, limits: Limits, number: str):
    self.asked, self.limits = asked, limits
    kind = "chat.completion" if asked.chat else "text_completion"
    self.head = {"id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{number}", "object": kind, "created": int(time.time()),
                 "model": limits.model}
    self.texts = [""] * asked.traces
    self.tokens: list[list[int]] = [[] for _ in range(asked.traces)]
    self.logprobs: list[list[float]] = [[] for _ in range(asked.traces)]
    self.last: list[Piece | None] = [None] * asked.traces
    self.likelihoods: list[Likelihoods | None] = [None] * asked.traces  # of prompt and answer, where a second pass was made
    self._offsets = [Offsets(limits.tokenizer) for _ in range(asked.traces)]

  def add(self, piece: Piece) -> None:
    i = piece.trace
    self.texts[i] += piece.text
    self.tokens[i] += piece.tokens
    self.logprobs[i] += piece.logprobs
    if piece.finish:
      self.last[i] = piece

  @property
  def done(self) -> bool:
    return all(self.last)

  def usage(self) -> dict:
    prompt, said = sum(len(call.tokens) for call in self.asked.calls), sum(map(len, self.tokens))
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}

  def whole(self, vote: Vote | None = None) -> dict:
    """The answer to a call that is done; with a vote, the one trace that it chose, and the vote."""
    chosen = range(self.asked.traces) if vote is None else [vote.chosen]
    choices = []
    for at, i in enumerate(chosen):
      text, tokens, logprobs = self.texts[i], self.tokens[i], self.logprobs[i]
      prompt = self.asked.call_of(i).tokens.tolist() if self.asked.echo else []
      text = self.limits.tokenizer.decode(prompt, skip_special_tokens=True) + text if prompt else text
      known = self.likelihoods[i]
      if known is not None:
        logprobs = known.logprobs.tolist()[0 if prompt else -len(tokens) or len(known.logprobs):]
      self._offsets[i] = Offsets(self.limits.tokenizer)
      content = {"message": {"role": "assistant", "content": text}} if self.asked.chat else {"text": text}
      choices.append({"index": at, **content, "logprobs": self._logprobs(i, prompt + tokens, logprobs),
                      "finish_reason": _reason(self.last[i].finish)})
    out = self.head | {"choices": choices, "usage": self.usage()}
    return out if vote is None else out | {"vote": self._vote(vote)}

  def _vote(self, vote: Vote) -> dict:
    number = lambda x: float(x) if x is not None and math.isfinite(x) else None
    traces = [{"index": i, "text": self.texts[i], "answer": vote.answers[i], "score": number(vote.scores[i]),
               "weight": vote.weights[i], "posterior": number(piece.rollout.posterior), "tokens": len(self.tokens[i]),
               "finish_reason": piece.finish} for i, piece in enumerate(self.last)]
    return {"rule": self.asked.vote, "answer": vote.answer, "trace": vote.chosen, "share": vote.weight,
            "open_pairs": vote.open_pairs, "traces": traces}

  def chunk(self, piece: Piece, first: bool) -> dict:
    """One event of a stream. first: of this trace."""
    if self.asked.chat:
      content = {"delta": ({"role": "assistant"} if first else {}) | {"content": piece.text}}
    else:
      content = {"text": piece.text}
    kind = {"object": "chat.completion.chunk"} if self.asked.chat else {}
    choice = {"index": piece.trace, **content, "logprobs": self._logprobs(piece.trace, piece.tokens, piece.logprobs),
              "finish_reason": _reason(piece.finish)}
    return self.head | kind | {"choices": [choice]} | ({"usage": self.usage()} if self.asked.always_usage else {})

  def closing(self) -> dict:
    """The last event of a stream that asked for the usage."""
    return self.head | ({"object": "chat.completion.chunk"} if self.asked.chat else {}) | {"choices": [], "usage": self.usage()}

  def _logprobs(self, i: int, tokens: list[int], logprobs: list[float]) -> dict | None:
    """The tokens' log-probs, a stop token's included, and the alternatives where they are known."""
    if not self.asked.logprobs:
      return None
    texts = [self._spell(token) for token in tokens]
    others = self._alternatives(i, len(tokens))
    logprobs = [min(p, 0.0) if p is not None and math.isfinite(p) else None for p in logprobs]  # 1e-10 by rounding
    if self.asked.chat:
      one = lambda text, p: {"token": text, "logprob": p, "bytes": _bytes(text)}
      return {"content": [one(t, p) | {"top_logprobs": [one(*other) for other in top or ()]}
                          for t, p, top in zip(texts, logprobs, others, strict=True)], "refusal": None}
    best_first = lambda top: dict(sorted(top, key=lambda other: other[1]))  # of two with the same text the likelier stays
    return {"tokens": texts, "token_logprobs": logprobs, "text_offset": self._offsets[i].add(tokens),
            "top_logprobs": [top and best_first(top) for top in others] if self.asked.alternatives else None}

  def _spell(self, token: int) -> str:
    return self.limits.tokenizer.decode([token])

  def _alternatives(self, i: int, count: int) -> list[list[tuple[str, float]] | None]:
    """The likeliest tokens and their log-probs at the last `count` places; None where there is nothing to tell."""
    known, k = self.likelihoods[i], self.asked.alternatives
    if known is None or not k:
      return [None] * count
    start = len(known.logprobs) - count
    return [[(self._spell(t), p) for t, p in zip(ids[:k].tolist(), ps[:k].tolist(), strict=True)] if start + at else None
            for at, (ids, ps) in enumerate(zip(known.tokens[start:], known.likeliest[start:], strict=True))]


def _bytes(text: str) -> list[int] | None:
  """Of a token that ends within a character the bytes are not known here: null, as the schema allows."""
  return None if "\ufffd" in text else list(text.encode())


def _reason(finish: str | None) -> str | None:
  """OpenAI knows no hopeless trace: it was cut short, as by a limit."""
  return "length" if finish == HOPELESS else finish


def nothing_said(trace: int) -> Piece:
  """The only piece of a trace that was to say nothing (max_tokens 0)."""
  return Piece(trace, "", [], [], "length", None)
