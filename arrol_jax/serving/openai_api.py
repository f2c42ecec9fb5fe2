"""OpenAI's completions and chat completions: a request's body -> calls. No HTTP here; answers.py makes the answers.

Every field is read or refused: what a body asks for and this server does not do ends in a `Refused` with one sentence.
Beyond OpenAI's fields: "vote" ("quality", "majority" or "deepconf", with n > 1), "stop_below" (a posterior in (0, 1)) and
"ignore_eos". Left out: suffix, penalties, logit_bias, tools, response formats, and alternatives in a stream.
"""

import dataclasses

import numpy as np

from arrol_jax.serving import fields, prompts
from arrol_jax.serving.calls import Call
from arrol_jax.serving.fields import Refused
from arrol_jax.serving.votes import RULES

COARSEST = 0.01  # temperatures below it are greedy: logits divided by less overflow
SEEDS = 2**63    # seeds are at least -SEEDS and less than SEEDS
MAX_STOPS, MAX_STOP = 8, 256  # strings, characters
MAX_ALTERNATIVES = 20
COMMON = {"model", "n", "temperature", "top_p", "max_tokens", "stop", "seed", "stream", "stream_options", "logprobs", "vote",
          "stop_below", "ignore_eos", "echo", "top_logprobs", "add_special_tokens"}
STREAM_OPTIONS = {"include_usage", "include_obfuscation", "continuous_usage_stats"}


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
  longest: int = 128     # characters of the longest token


@dataclasses.dataclass(frozen=True)
class Asked:
  """A body that was understood."""
  calls: tuple[Call, ...]  # one a prompt, with the same n
  chat: bool
  stream: bool
  usage: bool            # a stream ends with the usage
  always_usage: bool     # and every event has it
  logprobs: bool
  alternatives: int      # likeliest tokens told at each place
  echo: bool             # the answer begins with the prompt
  vote: str | None

  @property
  def traces(self) -> int:
    return len(self.calls) * self.calls[0].n

  def call_of(self, trace: int) -> Call:
    return self.calls[trace // self.calls[0].n]

  @property
  def second_pass(self) -> bool:
    """Whether the answer needs what decoding did not keep (scoring.py)."""
    return self.logprobs and (self.echo or self.alternatives > 0)


def read(raw: bytes, chat: bool, limits: Limits) -> Asked:
  """The calls that a request's body asks for. Raises Refused."""
  body, prompt = fields.parse(raw), "messages" if chat else "prompt"
  fields.check_names(body, COMMON | {prompt} | ({"max_completion_tokens"} if chat else set()))
  if body.get("model", limits.model) != limits.model:
    raise Refused(f"this server has the model {limits.model!r} only", "model", 404)
  if prompt not in body:
    raise Refused(f"the field {prompt!r} is missing", prompt)
  if body.get("add_special_tokens", not chat) is not (not chat):  # a chat template has written them
    raise Refused(f"add_special_tokens is always {'false' if chat else 'true'} here; leave it out", "add_special_tokens")
  echo = fields.boolean(body, "echo")
  call = _call(body, limits, least=0 if echo else 1)
  all_tokens = [prompts.chat(body["messages"], limits)] if chat else prompts.prompts(body["prompt"], limits)
  for tokens in all_tokens:
    if not 1 <= len(tokens) <= limits.max_prompt:
      raise Refused(f"the prompt has {len(tokens)} tokens; this server takes 1 to {limits.max_prompt}", prompt)
  if len(all_tokens) * call.n > limits.max_traces:
    raise Refused(f"{len(all_tokens)} prompts with n={call.n} are more than the {limits.max_traces} traces that fit", "n")
  calls = tuple(call._replace(tokens=np.asarray(tokens, np.int32)) for tokens in all_tokens)
  return _asked(body, calls, echo, chat, limits)


def _call(body: dict, limits: Limits, least: int) -> Call:
  """What a body asks of each trace, without the prompt."""
  longest = min(fields.integer(body, name, limits.max_new, least, limits.max_new)  # with both, neither is exceeded
                for name in ("max_tokens", "max_completion_tokens"))
  temperature, top_p = fields.number(body, "temperature", 1.0, 0.0, 2.0), fields.number(body, "top_p", 1.0, 0.0, 1.0)
  if temperature < COARSEST or top_p == 0:  # the likeliest token, in either case
    temperature, top_p = 0.0, 1.0
  seed = fields.integer(body, "seed", None, -SEEDS, SEEDS - 1)
  return Call(np.zeros(0, np.int32), longest, fields.integer(body, "n", 1, 1, limits.max_traces), temperature, top_p,
              None if seed is None else seed % (2 * SEEDS),
              fields.texts(body, "stop", MAX_STOPS, MAX_STOP), fields.number(body, "stop_below", 0.0, 0.0, 1.0),
              fields.boolean(body, "ignore_eos"), body.get("vote") is not None)


def _asked(body: dict, calls: tuple[Call, ...], echo: bool, chat: bool, limits: Limits) -> Asked:
  stream, options = fields.boolean(body, "stream"), body.get("stream_options", {})
  vote = _vote(body, calls, stream, limits)
  if calls[0].stop_below > 0 and not limits.calibrated:
    raise Refused("this model has no quality head with a table of past rollouts: leave stop_below out", "stop_below")
  if not isinstance(options, dict) or not set(options) <= STREAM_OPTIONS:
    raise Refused("stream_options takes include_usage and continuous_usage_stats only", "stream_options")
  logprobs, alternatives = _logprobs(body, chat)
  if alternatives and (stream or vote):
    raise Refused("alternatives to the chosen tokens are known when a trace has ended: leave stream and vote out", "logprobs")
  if echo and (chat or stream or vote):
    raise Refused("echo is for completions without stream and vote only", "echo")
  options = {name: fields.boolean(options, name) for name in STREAM_OPTIONS}
  usage = stream and options["include_usage"]
  return Asked(calls, chat, stream, usage, usage and options["continuous_usage_stats"], logprobs, alternatives, echo, vote)


def _vote(body: dict, calls: tuple[Call, ...], stream: bool, limits: Limits) -> str | None:
  vote = body.get("vote")
  if vote is None:
    return None
  if not isinstance(vote, str) or vote not in RULES:
    raise Refused(f"vote must be one of {', '.join(RULES)}", "vote")
  if calls[0].n < 2:
    raise Refused("a vote needs n of at least 2", "vote")
  if len(calls) > 1:
    raise Refused("a vote is over one prompt's traces: send one prompt a call", "vote")
  if stream:
    raise Refused("a vote is known when all traces have ended: leave stream out", "vote")
  if vote == "quality" and not limits.scored:
    raise Refused("this model has no quality head: vote by majority or deepconf", "vote")
  return vote


def _logprobs(body: dict, chat: bool) -> tuple[bool, int]:
  """Whether log-probs are wanted, and how many alternatives at each place."""
  logprobs = body.get("logprobs", False)
  if chat:
    logprobs, alternatives = fields.boolean(body, "logprobs"), fields.integer(body, "top_logprobs", 0, 0, MAX_ALTERNATIVES)
    if alternatives and not logprobs:
      raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
    return logprobs, alternatives
  if body.get("top_logprobs", 0) != 0:
    raise Refused("top_logprobs is chat's field: completions take the number in logprobs", "top_logprobs")
  if isinstance(logprobs, bool):
    return logprobs, 0
  return True, fields.integer(body, "logprobs", 0, 0, MAX_ALTERNATIVES)
