"""Reading single fields of a request's body: a value of the right kind within its range, or one sentence on what is wrong."""

import json


class Refused(Exception):
  """The caller's mistake: status, the field it is about, one sentence."""

  def __init__(self, text: str, field: str | None = None, status: int = 400):
    super().__init__(text)
    self.field, self.status = field, status


# Fields that clients send at these values, where they mean nothing: other values are refused. null always means left out.
NEUTRAL = {
  "suffix": ("",), "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "length_penalty": (1,),
  "logit_bias": ({}, []), "best_of": (1,), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
  "function_call": ("none", "auto"), "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},),
  "modalities": (["text"],), "top_k": (-1, 0), "min_p": (0,), "typical_p": (1,), "min_tokens": (0,), "use_beam_search": (False,),
  "early_stopping": (False,), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "detokenize": (True,),
  "include_stop_str_in_output": (False,), "stop_token_ids": ([],), "bad_words": ([],), "return_token_ids": (False,),
  "return_tokens_as_token_ids": (False,), "add_generation_prompt": (True,), "continue_final_message": (False,),
  "chat_template_kwargs": ({},), "priority": (0,), "prompt_logprobs": (0,),
}
# Nothing here depends on them.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
           "request_id"}
WHY_NOT = {
  "response_format": "response_format takes text only: nothing here holds a model to JSON or a schema; ask for it in the prompt",
  "presence_penalty": "presence_penalty is not supported here: tokens are drawn from the model's own distribution",
  "frequency_penalty": "frequency_penalty is not supported here: tokens are drawn from the model's own distribution",
  "repetition_penalty": "repetition_penalty is not supported here: tokens are drawn from the model's own distribution",
  "top_k": "top_k is the server's setting (rollout.top_k) and no call's: leave it out or use top_p",
  "min_p": "min_p is the server's setting (rollout.min_p) and no call's: leave it out or use top_p",
}


def parse(raw: bytes) -> dict:
  """A body's JSON object, without the fields that are null, at any depth."""
  try:
    body = json.loads(raw.decode("utf-8"), object_hook=lambda fields: {k: v for k, v in fields.items() if v is not None})
    json.dumps(body, ensure_ascii=False).encode("utf-8")
  except UnicodeDecodeError:
    raise Refused("the body is not UTF-8 text; send a JSON object") from None
  except UnicodeEncodeError:
    raise Refused("the body holds half a character (an unpaired surrogate)") from None
  except (ValueError, RecursionError) as e:
    if "integer string conversion" in str(e):
      raise Refused("the JSON holds a number of thousands of digits") from None
    raise Refused("the body is not JSON; send a JSON object") from None
  if not isinstance(body, dict):
    raise Refused("the body is not a JSON object")
  return body


def check_names(body: dict, known: set[str]) -> None:
  """Every field is read or refused."""
  for name in body:
    if name not in known and name not in NEUTRAL and name not in IGNORED:
      raise Refused(f"the field {name[:60]!r} is not known here", name[:60])
  for name, neutral in NEUTRAL.items():
    if name not in known and name in body and body[name] not in neutral:
      raise Refused(WHY_NOT.get(name, f"{name} is not supported here; leave it out"), name)


def integer(body: dict, name: str, default, low: int, high: int):
  value = body.get(name, default)
  if value is not default and (type(value) is not int or not low <= value <= high):
    raise Refused(f"{name} must be an integer from {low} to {high}", name)
  return value


def number(body: dict, name: str, default: float, low: float, high: float) -> float:
  value = body.get(name, default)
  if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN is not
    raise Refused(f"{name} must be a number from {low:g} to {high:g}", name)
  return float(value)


def boolean(body: dict, name: str) -> bool:
  if not isinstance(body.get(name, False), bool):
    raise Refused(f"{name} must be true or false", name)
  return body.get(name, False)


def texts(body: dict, name: str, most: int, longest: int) -> tuple[str, ...]:
  """One text or a list of them."""
  value = body.get(name, [])
  value = [value] if isinstance(value, str) else value
  if not isinstance(value, list) or len(value) > most or not all(isinstance(s, str) and 1 <= len(s) <= longest for s in value):
    raise Refused(f"{name} must be up to {most} texts of 1 to {longest} characters", name)
  return tuple(value)
