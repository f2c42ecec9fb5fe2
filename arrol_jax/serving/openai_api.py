"""The JSON of OpenAI's completions and chat completions: bodies -> calls, pieces -> answers. No HTTP here.

Every field is read or refused: what a body asks for and this server does not do ends in a `Refused` with one sentence.
Beyond OpenAI's fields: "vote" ("quality", "majority" or "deepconf", with n > 1) and "stop_below" (a posterior in (0, 1)).
Left out: several prompts in a call, alternatives to the chosen token, echo, suffix, penalties, logit_bias, tools, response
formats.
"""

import dataclasses
import json
import math
import time

import numpy as np

from arrol_jax.serving.service import HOPELESS, VOTES, Call, Piece, Vote

COARSEST = 0.01  # temperatures below it are greedy: logits divided by less overflow
MAX_STOPS, MAX_STOP = 8, 256  # strings, characters

# Fields that clients send at these values, where they mean nothing: other values are refused.
NEUTRAL = {
  "echo": (False,), "suffix": ("",), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "best_of": (1,),
  "tools": ([],), "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},), "parallel_tool_calls": (True, False),
  "top_logprobs": (0,),
}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}  # nothing here depends on them
COMMON = {"model", "n", "temperature", "top_p", "max_tokens", "stop", "seed", "stream", "stream_options", "logprobs", "vote",
          "stop_below"}


class Refused(Exception):
  """The caller's mistake: status, the field it is about, one sentence."""

  def __init__(self, text: str, field: str | None = None, status: int = 400):
    super().__init__(text)
    self.field, self.status = field, status


@dataclasses.dataclass(frozen=True)
class Limits:
  """What this server grants, and what its model can do."""
  model: str
  max_prompt: int
  max_new: int
  max_traces: int
  vocab: int
  tokenizer: object
  pattern: str | None    # where votes find the answer
  window: int            # tokens of DeepConf's groups
  scored: bool           # there is a quality head
  calibrated: bool       # and a table of past rollouts for it
  thinking: bool = False


@dataclasses.dataclass(frozen=True)
class Asked:
  """A body that was understood."""
  call: Call
  chat: bool
  stream: bool
  usage: bool            # a stream ends with the usage
  logprobs: bool
  vote: str | None


def read(raw: bytes, chat: bool, limits: Limits) -> Asked:
  """The call that a request's body asks for. Raises Refused."""
  body = _json(raw)
  prompt = "messages" if chat else "prompt"
  known = COMMON | IGNORED | NEUTRAL.keys() | {prompt} | ({"max_completion_tokens"} if chat else set())
  for name in body:
    if name not in known:
      raise Refused(f"the field {name[:60]!r} is not known here", name[:60])
  body = {name: value for name, value in body.items() if value is not None}  # null means left out
  for name, neutral in NEUTRAL.items():
    if body.get(name, neutral[0]) not in neutral:
      raise Refused(f"{name} is not supported here; leave it out", name)
  if body.get("model", limits.model) != limits.model:
    raise Refused(f"this server has the model {limits.model!r} only", "model", 404)
  if prompt not in body:
    raise Refused(f"the field {prompt!r} is missing", prompt)
  tokens = _chat_tokens(body["messages"], limits) if chat else _prompt_tokens(body["prompt"], limits)
  if not 1 <= len(tokens) <= limits.max_prompt:
    raise Refused(f"the prompt has {len(tokens)} tokens; this server takes 1 to {limits.max_prompt}", prompt)
  longest = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
  temperature = _number(body, "temperature", 1.0, 0.0, 2.0)
  call = Call(np.asarray(tokens, np.int32), _integer(body, longest, limits.max_new, 1, limits.max_new),
              _integer(body, "n", 1, 1, limits.max_traces), 0.0 if temperature < COARSEST else temperature,
              _number(body, "top_p", 1.0, 1e-6, 1.0), _integer(body, "seed", None, 0, 2**63 - 1), _stop(body),
              _number(body, "stop_below", 0.0, 0.0, 1.0))
  return _asked(body, call, chat, limits)


def _asked(body: dict, call: Call, chat: bool, limits: Limits) -> Asked:
  vote, stream, options = body.get("vote"), _boolean(body, "stream"), body.get("stream_options", {})
  if vote is not None:
    if not isinstance(vote, str) or vote not in VOTES:
      raise Refused(f"vote must be one of {', '.join(VOTES)}", "vote")
    if call.n < 2:
      raise Refused("a vote needs n of at least 2", "vote")
    if stream:
      raise Refused("a vote is known when all traces have ended: leave stream out", "vote")
    if vote == "quality" and not limits.scored:
      raise Refused("this model has no quality head: vote by majority or deepconf", "vote")
  if call.stop_below > 0 and not limits.calibrated:
    raise Refused("this model has no quality head with a table of past rollouts: leave stop_below out", "stop_below")
  if not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation"}:
    raise Refused("stream_options takes include_usage only", "stream_options")
  logprobs = body.get("logprobs", False)
  if not chat and logprobs == 0 and not isinstance(logprobs, bool):
    logprobs = True  # completions: an integer, how many alternatives
  if not isinstance(logprobs, bool):
    raise Refused("log-probs are those of the chosen tokens only: logprobs is " + ("a boolean here" if chat else "0 or left out"),
                  "logprobs")
  return Asked(call, chat, stream, stream and _boolean(options, "include_usage"), logprobs, vote)


def _json(raw: bytes) -> dict:
  try:
    body = json.loads(raw.decode("utf-8"))
  except UnicodeDecodeError:
    raise Refused("the body is not UTF-8 text; send a JSON object") from None
  except (ValueError, RecursionError):
    raise Refused("the body is not JSON; send a JSON object") from None
  if not isinstance(body, dict):
    raise Refused("the body is not a JSON object")
  return body


def _text(value: str, field: str) -> str:
  try:
    value.encode("utf-8")
  except UnicodeEncodeError:
    raise Refused(f"{field} holds half a character (an unpaired surrogate)", field) from None
  return value


def _prompt_tokens(prompt, limits: Limits) -> list[int]:
  """A text, or the tokens themselves; a list of one of them too."""
  if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
    prompt = prompt[0]
  if isinstance(prompt, str):
    return _known(limits.tokenizer.encode(_text(prompt, "prompt")), limits, "prompt")
  if not isinstance(prompt, list) or not all(type(t) is int for t in prompt):
    raise Refused("prompt must be one text or one list of token numbers", "prompt")
  if not all(0 <= t < limits.vocab for t in prompt):
    raise Refused(f"prompt holds a token number outside 0 to {limits.vocab - 1}", "prompt")
  return prompt


def _chat_tokens(messages, limits: Limits) -> list[int]:
  if not getattr(limits.tokenizer, "chat_template", None):
    raise Refused("this model has no chat template: use /v1/completions", "messages")
  if not isinstance(messages, list) or not messages:
    raise Refused("messages must be a list of at least one message", "messages")
  said = [{"role": m["role"], "content": _content(m.get("content"))} if isinstance(m, dict) and isinstance(m.get("role"), str)
          else _bad_message(i) for i, m in enumerate(messages)]
  try:
    text = limits.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=limits.thinking)
  except Exception as e:  # a template is a program, and may refuse an order of roles in its own words
    raise Refused(f"the model's chat template refuses these messages: {' '.join(str(e).split())[:200]}", "messages") from None
  return _known(limits.tokenizer.encode(text, add_special_tokens=False), limits, "messages")


def _known(tokens: list[int], limits: Limits, field: str) -> list[int]:
  """The tokens of a text, if the model has an embedding for all of them."""
  strange = next((t for t in tokens if t >= limits.vocab), None)
  if strange is not None:
    raise Refused(f"{field} holds {limits.tokenizer.convert_ids_to_tokens(strange)!r}, which the tokenizer knows as {strange} "
                  f"and the model, with {limits.vocab} tokens, does not", field)
  return tokens


def _bad_message(i: int):
  raise Refused(f"message {i} must be an object with a role and a content", "messages")


def _content(content) -> str:
  """A message's text: a string, or a list of text parts."""
  if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
    content = "".join(p["text"] for p in content)
  if not isinstance(content, str):
    raise Refused("a message's content must be text", "messages")
  return _text(content, "messages")


def _integer(body: dict, name: str, default, low: int, high: int):
  value = body.get(name, default)
  if value is not default and (type(value) is not int or not low <= value <= high):
    raise Refused(f"{name} must be an integer from {low} to {high}", name)
  return value


def _number(body: dict, name: str, default: float, low: float, high: float) -> float:
  value = body.get(name, default)
  if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN is not
    raise Refused(f"{name} must be a number from {low:g} to {high:g}", name)
  return float(value)


def _boolean(body: dict, name: str) -> bool:
  if not isinstance(body.get(name, False), bool):
    raise Refused(f"{name} must be true or false", name)
  return body.get(name, False)


def _stop(body: dict) -> tuple[str, ...]:
  stop = body.get("stop", [])
  stop = [stop] if isinstance(stop, str) else stop
  if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(s, str) and 1 <= len(s) <= MAX_STOP for s in stop):
    raise Refused(f"stop must be up to {MAX_STOPS} texts of 1 to {MAX_STOP} characters", "stop")
  return tuple(_text(s, "stop") for s in stop)


# ---- answers ------------------------------------------------------------------------------------------------


def refusal(text: str, status: int, field: str | None = None) -> dict:
  kind = "invalid_request_error" if status < 429 else "server_error" if status >= 500 else "rate_limit_error"
  return {"error": {"message": text, "type": kind, "param": field, "code": status}}


class Answer:
  """Pieces -> OpenAI's JSON, whole or in chunks."""

  def __init__(self, asked: Asked, limits: Limits, number: str):
    self.asked, self.limits = asked, limits
    kind = "chat.completion" if asked.chat else "text_completion"
    self.head = {"id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{number}", "object": kind, "created": int(time.time()),
                 "model": limits.model}
    self.texts = [""] * asked.call.n
    self.tokens: list[list[int]] = [[] for _ in range(asked.call.n)]
    self.logprobs: list[list[float]] = [[] for _ in range(asked.call.n)]
    self.last: list[Piece | None] = [None] * asked.call.n
    self._offset = [0] * asked.call.n

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
    prompt, said = len(self.asked.call.tokens), sum(map(len, self.tokens))
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}

  def whole(self, vote: Vote | None = None) -> dict:
    """The answer to a call that is done; with a vote, the one trace that it chose, and the vote."""
    chosen = range(self.asked.call.n) if vote is None else [vote.chosen]
    choices = []
    for at, i in enumerate(chosen):
      content = {"message": {"role": "assistant", "content": self.texts[i]}} if self.asked.chat else {"text": self.texts[i]}
      self._offset[i] = 0
      choices.append({"index": at, **content, "logprobs": self._logprobs(i, self.tokens[i], self.logprobs[i]),
                      "finish_reason": _reason(self.last[i].finish)})
    out = self.head | {"choices": choices, "usage": self.usage()}
    return out if vote is None else out | {"vote": self._vote(vote)}

  def _vote(self, vote: Vote) -> dict:
    number = lambda x: float(x) if x is not None and math.isfinite(x) else None
    traces = [{"index": i, "text": self.texts[i], "answer": vote.answers[i], "score": number(vote.scores[i]),
               "weight": vote.weights[i], "posterior": number(piece.rollout.posterior), "tokens": len(self.tokens[i]),
               "finish_reason": piece.finish} for i, piece in enumerate(self.last)]
    return {"rule": self.asked.vote, "answer": vote.answer, "trace": vote.chosen, "share": vote.weight, "traces": traces}

  def chunk(self, piece: Piece, first: bool) -> dict:
    """One event of a stream. first: of this trace."""
    if self.asked.chat:
      content = {"delta": ({"role": "assistant"} if first else {}) | {"content": piece.text}}
    else:
      content = {"text": piece.text}
    kind = {"object": "chat.completion.chunk"} if self.asked.chat else {}
    choice = {"index": piece.trace, **content, "logprobs": self._logprobs(piece.trace, piece.tokens, piece.logprobs),
              "finish_reason": _reason(piece.finish)}
    return self.head | kind | {"choices": [choice]}

  def closing(self) -> dict:
    """The last event of a stream that asked for the usage."""
    return self.head | ({"object": "chat.completion.chunk"} if self.asked.chat else {}) | {"choices": [], "usage": self.usage()}

  def _logprobs(self, i: int, tokens: list[int], logprobs: list[float]) -> dict | None:
    """The chosen tokens' log-probs, a stop token's included."""
    if not self.asked.logprobs:
      return None
    texts = [self.limits.tokenizer.decode([token]) for token in tokens]
    if self.asked.chat:
      # Of a token that ends within a character the bytes are not known here: null, as the schema allows.
      return {"content": [{"token": t, "logprob": p, "bytes": None if "\ufffd" in t else list(t.encode()), "top_logprobs": []}
                          for t, p in zip(texts, logprobs, strict=True)], "refusal": None}
    offsets = np.cumsum([self._offset[i]] + [len(t) for t in texts]).tolist()
    self._offset[i] = offsets.pop()
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}


def _reason(finish: str | None) -> str | None:
  """OpenAI knows no hopeless trace: it was cut short, as by a limit."""
  return "length" if finish == HOPELESS else finish
