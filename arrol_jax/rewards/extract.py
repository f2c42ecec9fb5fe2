"""From a response to the text of its final answer. What that text means is notation.py's and grade.py's.

Left out: natural-language answers ("the answer is twelve") outside a box or a marked line.
"""

from collections import deque
from collections.abc import Iterator
import contextlib
import re
from re import _parser

import regex

from arrol_jax.rewards.counted import announces

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
SEARCH_S = 1.0  # what a pattern of the user's may take on one response; `regex` counts the time of all threads of the process

# Answer formats by name. A marker takes what follows it on its line, up to the next marker: **Final Answer:** 12.
PATTERNS = {
  "boxed": None,
  "answer": r"(?i:answer(?:[ \t]+is)?)[*_`]{0,3}[ \t]*+[:：][ \t*_]*+([^\n]+)",
  "hashes": r"####[ \t]*+([^\n]+)",
  "first_hashes": r"(?s)\A.*?####[ \t]*+([^\n]+)",
}
_MARKERS = {"answer": re.compile(r"(?i:answer(?:[ \t]+is)?)[*_`]{0,3}[ \t]*[:：]"), "hashes": re.compile("####"),
            "first_hashes": re.compile("####")}
# "not the", "the wrong", before "answer: 12"
_DENIED = re.compile(r"(?i)(?<!\w)(?:wrong|incorrect|false|invalid|not|no|\w+n['’]t|twice|half|double|triple)"
                     r"(?:\s+(?:the|an?|my|our|your|his|her|their|old|first|final|correct|right|real|true|actual)){0,3}[\s*_`]*$")
# The sentence or bracket that such words cut short: "12. A wrong" is 12
_UNFINISHED = re.compile(r"(?:[.,;!?(]|\s[-–—])\s*+[^\W\d_]*+(?:\s++[^\W\d_]++)*+\s*+$")
# What stands around an answer on its line: "The final answer is $12$. I hope it is correct."
_LEAD = re.compile(
  r"(?i)[\s*_`]*(?:(?:so|thus|hence|therefore)\b,?\s*)?(?:(?:the|my|our)\s+)?(?:final\s+|correct\s+)?"
  r"(?:(?:answer|result|solution|value)\s*(?:is|:|=)|it\s+is\b|it's\b|there\s+(?:is|are)\b"
  r"|(?:[a-z]+(?:['’]s)?\s+){1,6}?(?:is|are|equals)\b(?!\s+(?:not|more|less|at|between|no|either|divisible)\b)"
  r"|(?:[a-z]+(?:['’]s)?\s+){0,5}[a-z]{2,}:(?=\s*[-\d$\\(\[{]))[\s:*_]*(?=\S)")
_TRAIL = re.compile(r"(?i)[.。]?\s*i\s+hope\s+(?:it|this)\s+(?:is|helps)[^\n]*$")


def check_pattern(pattern: str | None) -> None:
  """Raises ValueError if `pattern` is neither None, a name in PATTERNS nor a regular expression with a group."""
  pattern = PATTERNS.get(pattern, pattern)
  if pattern is None:
    return
  try:
    groups = regex.compile(pattern).groups
  except regex.error as error:
    raise ValueError(f"answer pattern {pattern!r} is not a regular expression: {error}") from None
  if groups < 1:
    raise ValueError(f"answer pattern {pattern!r} has no group: put the answer in (parentheses)")


def extract_answer(response: str, pattern: str | None = None) -> str | None:
  """The final answer's text, or None where the response has none.

  pattern None or "boxed": the content of the last \\boxed{...}, braces balanced, escaped braces not counted. If that
  last box is never closed (a truncated response) there is no answer, even if an earlier box was complete; of
  nested boxes the inner one counts; \\fbox does not. Takes time linear in the response's length.
  "answer": what follows the last "Answer:" on its line, but for those that words before it deny ("The wrong answer:"); "hashes":
  what follows the last "####"; "first_hashes": the first one (a base model shown examples goes on to questions of its own).
  Backticks around these three and words that only announce an answer ("The final answer is") are left out.
  Else a regular expression as the `regex` package reads it; group 1 of its last match (r"A(-?\\d+)$"). One that searches for more
  than a second has found nothing. Raises ValueError for a pattern that does not compile or has no group.
  """
  try:
    return search(response, pattern)
  except TimeoutError:
    return None


def search(response: str, pattern: str | None) -> str | None:
  """`extract_answer` that raises TimeoutError for a pattern that takes too long."""
  if PATTERNS.get(pattern, pattern) is not None:
    if pattern in PATTERNS:
      matches = re.finditer(PATTERNS[pattern], response)  # linear: needs no deadline
    else:
      check_pattern(pattern)
      matches = regex.finditer(pattern, response, timeout=SEARCH_S)
    if pattern == "answer":
      found = _last(text for text in (_not_denied(response, match) for match in matches) if text is not None)
    else:
      last = _last(matches)
      found = None if last is None else last.group(1)
    return found if found is None or pattern not in PATTERNS else _of_line(found, pattern)
  box = _last(_BOX.finditer(response))
  if box is None:
    return None
  depth = 1
  for brace in _BRACE.finditer(response, box.end()):
    depth += {"{": 1, "}": -1}.get(brace.group(), 0)
    if depth == 0:
      return response[box.end():brace.start()]
  return None


def response_with(answer: str, pattern: str | None) -> str | None:
  """A response whose final answer is `answer`; None where none could be made that `pattern` finds it in."""
  forms = {None: "\\boxed{%s}", "boxed": "\\boxed{%s}", "answer": "Answer: %s", "hashes": "#### %s", "first_hashes": "#### %s"}
  if pattern in forms:
    return forms[pattern].replace("%s", answer)
  with contextlib.suppress(re.error, IndexError):  # one that only the `regex` package reads
    made = _example(_parser.parse(pattern), answer)
    found = extract_answer(made, pattern)
    return made if found is not None and found.strip() == answer.strip() else None
  return None


def _example(parsed: _parser.SubPattern, answer: str) -> str:
  """A short text that a parsed pattern matches, with `answer` for its first group."""
  out = ""
  for kind, value in parsed:
    match str(kind):
      case "LITERAL":
        out += chr(value)
      case "SUBPATTERN":
        out += answer if value[0] == 1 else _example(value[3], answer)
      case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
        few = max(value[0], int(any(str(k) == "SUBPATTERN" for k, _ in value[2])))
        out += _example(value[2], answer) * min(few, 100)
      case "BRANCH":
        out += _example(value[1][0], answer)
      case "ATOMIC_GROUP":
        out += _example(value, answer)
      case "IN":
        out += next((chr(v if str(k) == "LITERAL" else v[0]) for k, v in value if str(k) in ("LITERAL", "RANGE")), " ")
      case "ANY" | "NOT_LITERAL":
        out += "."
  return out


def _of_line(line: str, pattern: str) -> str:
  """The answer in what follows a marker: behind the last further marker (for the first, before the next), less wrapping words."""
  parts = [part for part in _MARKERS[pattern].split(line) if part.strip()] or [""]
  text = parts[0 if pattern == "first_hashes" else -1].strip()
  text = _TRAIL.sub("", " ".join(text[:10_000].split()))  # a longer one is no answer
  text = re.sub(r"^(?:\*\*)?([^*\s](?:[^*]*[^*\s])?)\*\*(?=[\s.,])", r"\1", text)  # **57** apples
  for _ in range(2):
    text = re.sub(r"(?<=[*_`])[.。]$", "", text.strip()).strip("*_`").strip()
    lead = _LEAD.match(text)
    text = text.removeprefix("=") if lead is None else text[lead.end():] if announces(lead[0]) else text
  return text


def _not_denied(response: str, match: re.Match) -> str | None:
  """What follows the last "answer:" of a line that words before it do not deny ("12. The wrong answer: 13" is 12), or None."""
  end, line = match.end(), response.rfind("\n", 0, match.start()) + 1
  for marker in reversed([*_MARKERS["answer"].finditer(response, match.start(), match.end())]):
    begin = max(line, marker.start() - 100)
    denial = _DENIED.search(response[begin:marker.start()])
    if denial is None:
      return match.group(1) if end == match.end() else _UNFINISHED.sub("", response[marker.end():end])
    end = begin + denial.start()
  return None


def _last(matches: Iterator):
  last = deque(matches, maxlen=1)
  return last[0] if last else None


def nesting(text: str) -> int:
  """The deepest nesting of brackets of any kind; half-open intervals close with either bracket."""
  depth = deepest = 0
  for character in text:
    if character in "{([":
      depth += 1
      deepest = max(deepest, depth)
    elif character in "})]":
      depth -= 1
  return deepest
