"""What the policy will read: problems that were taken and left out, a prompt token by token, stop tokens, lengths."""

from collections.abc import Iterable
import statistics

from ml_collections import ConfigDict

from arrol_jax import assemble
from arrol_jax.data import sources
from arrol_jax.data.problems import Prompt
from arrol_jax.models.files.weights import Policy
from arrol_jax.preflight.page import Page

MOST_SKIPPED = 0.1  # of a source's problems, before it is worth a warning
_EXAMPLES = 2
_SHOWN = 60  # tokens at each end of a prompt


def train_prompts(page: Page, c: ConfigDict, loaded: Policy) -> list[Prompt]:
  out = _read(page, c, loaded, c.data.train, "data.train", "train")
  asked = assemble.candidates(c)
  page.say(f"{c.steps:,} steps x {asked:,} prompts: {c.steps * asked / len(out):.2f} times through them")
  if len(out) < asked:
    page.warn(f"data.train has {len(out)} prompts and a step takes {asked}: the same ones come several times within a step "
              f"({'rollout.candidates' if c.rollout.candidates else 'rollout.prompts'})")
  answers = {}
  for p in out:
    answers.setdefault(p.problem.problem.strip(), set()).add(p.problem.answer.strip())
  several = next(((text, found) for text, found in answers.items() if len(found) > 1), None)
  if several:
    count = sum(len(found) > 1 for found in answers.values())
    page.warn(f"data.train: {count} problems stand there with several answers, the first with "
              f"{' and '.join(map(repr, sorted(several[1])[:2]))}: {_short(several[0])!r}")
  return out


def held_out_prompts(page: Page, c: ConfigDict, loaded: Policy, train: list[Prompt]) -> dict[str, list[Prompt]]:
  out, known = {}, {p.problem.problem.strip() for p in train}
  for path in sources.split_list(c.data.eval):
    out[path] = _read(page, c, loaded, path, "data.eval", "test", c.eval.problems)
    seen = sum(p.problem.problem.strip() in known for p in out[path])
    if seen:
      page.warn(f"{seen} of {len(out[path])} problems of {path} are in data.train too: accuracy on them is not held out")
  if not out:
    page.say("data.eval is empty: no evaluation")
  return out


def _read(page: Page, c: ConfigDict, loaded: Policy, path: str, key: str, split: str, limit: int = 0) -> list[Prompt]:
  out, skipped = assemble.encoded(c, loaded, path, limit, split)
  lengths = [len(p.tokens) for p in out]
  page.say(f"{key}={path}: {len(out):,} read, of {min(lengths)} to {max(lengths)} tokens (half of them up to "
           f"{statistics.median_low(lengths)})")
  if skipped:
    page.say(f"{len(skipped):,} skipped, longer than rollout.max_prompt = {c.rollout.max_prompt} tokens: " + ", ".join(
      f"{p.problem.id!r} ({len(p.tokens)})" for p in skipped[:_EXAMPLES]) + (", ..." if len(skipped) > _EXAMPLES else ""))
  everything = len(out) + len(skipped)
  if len(skipped) > MOST_SKIPPED * everything:
    page.warn(f"{key}: {len(skipped)} of {everything} prompts ({len(skipped) / everything:.0%}) are left out for having more "
              f"than rollout.max_prompt = {c.rollout.max_prompt} tokens; the longest has {max(len(p.tokens) for p in skipped)}")
  return out


def one_prompt(page: Page, loaded: Policy, prompts: list[Prompt]) -> None:
  """The first prompt by its tokens, special ones in brackets."""
  first, tokenizer = prompts[0], loaded.tokenizer
  special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
  pieces = [f"[{tokenizer.convert_ids_to_tokens(int(i))}]" if int(i) in special else _visible(tokenizer.decode([int(i)]))
            for i in first.tokens]
  if len(pieces) > 2 * _SHOWN:
    pieces = [*pieces[:_SHOWN], f" ... {len(pieces) - 2 * _SHOWN} more ... ", *pieces[-_SHOWN:]]
  page.say(f"{first.problem.id!r}, {len(first.tokens)} tokens, special ones in brackets:")
  page.say("|".join(pieces))
  page.say(f"its answer: {_short(first.problem.answer)}")


def tokenizer(page: Page, c: ConfigDict, loaded: Policy, prompts: Iterable[Prompt]) -> None:
  """Stop tokens, and what train.py warns of."""
  name = loaded.tokenizer.convert_ids_to_tokens
  page.say(", ".join(f"{name(i)} ({i})" for i in loaded.eos_ids) or "none")
  page.warnings += assemble.warnings(c, loaded, list(prompts))
  ids = len(loaded.tokenizer)
  if ids > loaded.config.vocab:
    page.warn(f"the tokenizer has {ids:,} ids and the model's embedding {loaded.config.vocab:,} rows: a prompt with one of the "
              "others is refused")
  if not c.data.chat and getattr(loaded.tokenizer, "chat_template", None):
    page.say("the tokenizer has a chat template, which data.chat=False leaves out (right for base models)")


def context(page: Page, c: ConfigDict, loaded: Policy, prompts: list[Prompt]) -> None:
  """The longest row beside the model's positions."""
  longest = assemble.longest_row(c, True, c.data.eval != "")
  new = f"max_new {c.rollout.max_new}" + (f" (evaluations {c.eval.max_new})" if c.data.eval and c.eval.max_new else "")
  page.say(f"max_prompt {c.rollout.max_prompt} + {new}: rows of {longest:,} tokens at most; the model has "
           f"{loaded.config.max_length:,} positions")
  most = max(len(p.tokens) for p in prompts)
  if c.rollout.max_prompt >= 64 and most < c.rollout.max_prompt / 2:
    page.say(f"the longest prompt has {most} tokens: rollout.max_prompt={most} would need less memory and time")


def _visible(text: str) -> str:
  return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("|", "\\|")


def _short(text: str, most: int = 80) -> str:
  text = " ".join(text.split())
  return text if len(text) <= most else text[:most] + "..."
