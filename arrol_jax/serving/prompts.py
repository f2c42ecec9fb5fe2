"""Prompts and messages -> tokens. What is too long is refused by its characters, before a tokenizer sees it.

What a user types is text: where a message's content holds the string of one of the tokenizer's special tokens (such as
<|im_end|>), it is encoded in parts that no special token matches, so that nobody can end his turn and begin another's. Only the
model's chat template writes special tokens. In /v1/completions the prompt is the caller's whole text, and they do count there.
"""

from collections.abc import Sequence
import functools
import re

from arrol_jax.serving.fields import Refused

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# A message's fields that mean nothing at these values; clients send an assistant's earlier message back with them.
EMPTY = {"type": ("text", "message"), "name": ("",), "tool_calls": ([],), "tool_call_id": ("",), "function_call": ({},),
         "refusal": ("",), "audio": ({},), "annotations": ([],), "reasoning_content": ("",), "reasoning": ("",),
         "reasoning_details": ([],), "thinking": ("",), "thinking_blocks": ([],), "images": ([],), "attachments": ([],),
         "provider_specific_fields": ({},), "prefix": (False,), "partial": (False,)}
EMPTY_PART = {"annotations": ([],)}
IGNORED = {"id", "status", "cache_control"}  # of a message or a part: nothing depends on them
FEWEST_CHARACTERS = 4096  # that are always read
SEVERAL = 16  # prompts of the longest kind, whose characters a call's prompts may have together
_MARK = "\ue000{}\ue001"  # of private use: stands for a special token's string in a rendered template
_MARKS = re.compile("\ue000([0-9]+)\ue001")


def longest_token(tokenizer) -> int:
  """Characters of the longest token: no text has fewer tokens than its characters divided by it."""
  return max((len(token) for token in tokenizer.get_vocab()), default=1)


def check_length(text: str, most_tokens: int, longest: int, field: str) -> str:
  """Raises Refused where a text has more characters than so many tokens can hold."""
  most = max(FEWEST_CHARACTERS, most_tokens * longest)
  if len(text) > most:
    raise Refused(f"the prompt has {len(text)} characters; this server takes at most {most_tokens} tokens and {most} characters",
                  field)
  return text


def prompts(prompt, limits) -> list[list[int]]:
  """The tokens of /v1/completions' prompts: one text or list of token numbers, or a list of several."""
  one = isinstance(prompt, str) or isinstance(prompt, list) and prompt != [] and all(type(t) is int for t in prompt)
  several = [prompt] if one else prompt
  if not isinstance(several, list) or not several or not all(isinstance(p, str | list) for p in several):
    raise Refused("prompt must be one text, one list of token numbers, or a list of these", "prompt")
  if len(several) > limits.max_traces:
    raise Refused(f"prompt lists {len(several)} prompts; this server takes at most {limits.max_traces} at once", "prompt")
  texts = [check_length(p, limits.max_prompt, limits.longest, "prompt") for p in several if isinstance(p, str)]
  if sum(map(len, texts)) > SEVERAL * max(FEWEST_CHARACTERS, limits.max_prompt * limits.longest):
    raise Refused(f"{len(texts)} prompts have {sum(map(len, texts))} characters together; send fewer in a call", "prompt")
  return [_tokens(p, limits) for p in several]


def plain(text: str, limits, field: str = "prompt") -> list[int]:
  """The tokens of a text as it is."""
  return _known(limits.tokenizer.encode(text), text, limits, field)


def _tokens(prompt: str | list, limits) -> list[int]:
  if isinstance(prompt, str):
    return plain(prompt, limits)
  if len(prompt) > limits.max_prompt:
    return prompt  # its length is refused, whatever is in it
  if not all(type(t) is int for t in prompt):
    raise Refused("prompt must be one text, one list of token numbers, or a list of these", "prompt")
  if not all(0 <= t < limits.vocab for t in prompt):
    raise Refused(f"prompt holds a token number outside 0 to {limits.vocab - 1}", "prompt")
  return prompt


def chat(messages, limits) -> list[int]:
  """The tokens of a conversation in the model's chat template."""
  tokenizer = limits.tokenizer
  if not getattr(tokenizer, "chat_template", None):
    raise Refused("this model has no chat template: use /v1/completions", "messages")
  if not isinstance(messages, list) or not messages:
    raise Refused("messages must be a list of at least one message", "messages")
  if len(messages) > max(64, limits.max_prompt):
    raise Refused(f"messages has {len(messages)} messages; this server takes at most {limits.max_prompt} tokens", "messages")
  said = [_message(i, m) for i, m in enumerate(messages)]
  check_length("".join(m["content"] for m in said), limits.max_prompt, limits.longest, "messages")
  special = _specials(tokenizer)
  typed: list[str] = []
  for m in said:
    m["content"] = _marked(m["content"], special, typed)
  try:
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=limits.thinking)
  except Exception as e:  # a template is a program, and may refuse an order of roles in its own words
    why = _MARKS.sub(lambda mark: typed[int(mark[1])], " ".join(str(e).split()))
    raise Refused(f"the model's chat template refuses these messages: {why[:200]}", "messages") from None
  check_length(text, 2 * limits.max_prompt, limits.longest, "messages")
  encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
  if not typed:
    return _known(encode(text), text, limits, "messages")
  out = []
  for i, part in enumerate(_MARKS.split(text)):
    for piece in _harmless(typed[int(part)], special) if i % 2 else [part]:
      out += encode(piece) if piece else []
  return _known(out, _MARKS.sub("", text), limits, "messages", typed)


def _known(tokens: list[int], text: str, limits, field: str, typed: Sequence[str] = ()) -> list[int]:
  """The tokens of a text, if they stand for all of it and the model has an embedding for all of them.

  typed: special tokens' strings that stand in it as text.
  """
  tokenizer, (name, number) = limits.tokenizer, _unknown(limits.tokenizer)
  if number in tokens and name not in text:
    special = _specials(tokenizer)
    lost = [c for c in dict.fromkeys(special.sub("", text) if special else text)
            if number in tokenizer.encode(c, add_special_tokens=False)]
    lost = [*map(repr, lost), *(f"{t!r} as text" for t in dict.fromkeys(typed) if any(
      number in tokenizer.encode(piece, add_special_tokens=False) for piece in _harmless(t, special) if piece))]
    raise Refused(f"the model's tokenizer has no token for {', '.join(lost[:8]) or 'a part'} of {field}", field)
  strange = next((t for t in tokens if t >= limits.vocab), None)
  if strange is not None:
    raise Refused(f"{field} holds {limits.tokenizer.convert_ids_to_tokens(strange)!r}, which the tokenizer knows as {strange} "
                  f"and the model, with {limits.vocab} tokens, does not", field)
  return tokens


def _message(i: int, m) -> dict:
  """A message's role and content; all else that it may have is refused unless it says nothing."""
  if not isinstance(m, dict) or not isinstance(m.get("role"), str):
    raise Refused(f"message {i} must be an object with a role and a content", "messages")
  if m["role"] not in ROLES:
    why = "tools are not supported here" if m["role"] in ("tool", "function") else f"use one of {', '.join(ROLES)}"
    raise Refused(f"message {i} has the role {m['role'][:40]!r}: {why}", "messages")
  for name, value in m.items():
    if name not in ("role", "content") and not _says_nothing(name, value, EMPTY):
      raise Refused(f"message {i} has a field {name[:40]!r} that is not supported here; leave it out", "messages")
  content = m.get("content")
  if isinstance(content, list):
    content = "".join(_part(i, part) for part in content)
  if not isinstance(content, str):
    raise Refused(f"message {i} needs a content, which must be text", "messages")
  if "\ue000" in content or "\ue001" in content:
    raise Refused(f"message {i} holds a character of private use (U+E000 or U+E001), which no text needs", "messages")
  return {"role": ROLES[m["role"]], "content": content}


def _says_nothing(name: str, value, empty: dict[str, tuple]) -> bool:
  return value is None or name in IGNORED or value in empty.get(name, ())


def _part(i: int, part) -> str:
  if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
    kind = part.get("type") if isinstance(part, dict) else None
    what = f"a part of type {kind[:40]!r}" if isinstance(kind, str) and kind != "text" else "a part that is not one of text"
    raise Refused(f"message {i} has {what}: this model reads text only", "messages")
  if not all(name in ("type", "text") or _says_nothing(name, value, EMPTY_PART) for name, value in part.items()):
    raise Refused(f"message {i} has a text part with more than a type and a text", "messages")
  return part["text"]


@functools.lru_cache(maxsize=8)
def _unknown(tokenizer) -> tuple[str, int]:
  """The token that stands for what the tokenizer does not know, and its number; -1 where it knows every byte."""
  name = getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "unk_token", None)
  return (name, tokenizer.convert_tokens_to_ids(name)) if name else ("", -1)


@functools.lru_cache(maxsize=8)
def _specials(tokenizer) -> re.Pattern | None:
  """Matches the string of any special token, the longest first."""
  added = getattr(tokenizer, "added_tokens_decoder", {}).values()
  names = {t.content for t in added if t.special} | set(getattr(tokenizer, "all_special_tokens", []))
  return re.compile("|".join(re.escape(n) for n in sorted(names, key=len, reverse=True) if n)) if names else None


def _marked(content: str, special: re.Pattern | None, typed: list[str]) -> str:
  """A content with marks in place of special tokens' strings, which are added to `typed`."""
  def mark(found: re.Match) -> str:
    typed.append(found[0])
    return _MARK.format(len(typed) - 1)
  return special.sub(mark, content) if special else content


def _harmless(text: str, special: re.Pattern) -> list[str]:
  """A special token's string in parts that are none."""
  parts, rest = [text[:1]], text[1:]
  while found := special.search(rest):
    parts.append(rest[:found.start() + 1])
    rest = rest[found.start() + 1:]
  return [*parts, rest]
