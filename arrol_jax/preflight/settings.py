"""Settings that may each be given and together teach little: what config.check has no reason to refuse."""

from ml_collections import ConfigDict

from arrol_jax import assemble
from arrol_jax.preflight import remarks
from arrol_jax.preflight.page import Page

_LEAST_FOR_ADAPTERS = 1e-5  # ten times what is usual for all weights


def settings(page: Page, c: ConfigDict) -> None:
  page.say(f"{c.loss.name}, {c.steps} steps, seed {c.seed}, {c.model.path}")
  page.warnings += remarks.of(c)
  p, r = c.prune, c.rollout
  left = r.group_size * p.keep
  if p.enabled and left < 2:
    page.warn(f"rollout.group_size {r.group_size} x prune.keep {p.keep:g}: fewer than two of a group are left, and one alone has "
              "no advantage: a larger group, or prune.enabled=False")
  if p.enabled and p.cold_start >= c.steps:
    page.warn(f"prune.cold_start is {p.cold_start} and steps is {c.steps}: nothing is ever pruned")
  if p.enabled and assemble.detect(c)[-1] > 0.9 * r.max_new:
    page.warn(f"prune.detect is {assemble.detect(c)} and rollout.max_new is {r.max_new}: a rollout that is cut there has been "
              "decoded almost to its end")
  if c.optim.lr == 0:
    page.warn("optim.lr is 0: the policy does not learn")
  if c.model.lora.rank and 0 < c.optim.lr < _LEAST_FOR_ADAPTERS:
    page.warn(f"optim.lr is {c.optim.lr:g}, a rate for all weights; adapters (model.lora.rank) hardly move with it: "
              f"{_LEAST_FOR_ADAPTERS:g} and more is usual")
