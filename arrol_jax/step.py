"""One training step, told once: train.py runs it, bench.py times it, plan.py compiles its programs.

1. Roll out: the engine decodes segments; at a boundary the head's score decides who goes on, survivors are graded meanwhile.
2. Batch: survivors, or those that dynamic sampling or a baseline chose among them, become a few fixed shapes.
3. Update: one optax step of the policy on the batch and of the head on all graded survivors.
4. Table: survivors' scores and rewards are added to the calibration table; the head may go over its buffer again.
5. Metrics.
step_programs.py lists what all this runs on the device. Where prompts and rewards come from is the caller's business.
"""

from collections.abc import Callable
import dataclasses
import time
from typing import NamedTuple

import jax
import numpy as np
import optax

from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine
from arrol_jax.learning import batching, candidates, head_training, update
from arrol_jax.learning.batching import PackShape
from arrol_jax.learning.metrics import rollout_metrics
from arrol_jax.learning.optimizers import Optimizer, applied_rate
from arrol_jax.learning.update import UpdateConfig
from arrol_jax.pruning import decision
from arrol_jax.pruning.baselines import down_sample
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.types import Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """What a step does, for a whole run (assemble.step_config makes it of the config)."""
  dtype: str
  sampling: Sampling
  temperature: float           # of the rollouts
  rule: PruneRule
  update: UpdateConfig
  shape: PackShape
  optimizer: Optimizer
  head_optimizer: optax.GradientTransformation | None = None  # goes over the head's buffer; None: there is none
  passes: int = 0              # over the buffer
  weigh: tuple[str, ...] = ()  # where survivors count 1 / keep probability times: "table", "head", "policy"
  balance: bool = False        # right and wrong weigh alike in the head's loss
  short: str = "skip"          # what rollouts that ended before detection teach the head
  half_life: float | None = None
  strength: float | None = None  # of a linear head's ridge, rollouts a feature; None: the head is the published one
  head_half_life: float | None = None  # rollouts started after which its examples weigh half, and the prompts' model's
  explore: float = 0.0         # share of the chosen prompts that is drawn at random
  prompt_strength: float = 8.0  # of the ridge behind the choice
  learn_keep: float = 1.0      # share of a group's survivors that is learned from, those whose rewards vary most (PODS)
  epochs: int = 1              # passes over a step's batch,
  minibatches: int = 1         # each in so many optimizer steps
  schedule: Callable = lambda count: 0.0  # learning rate of the policy by optimizer steps taken
  seed: int = 0


class RolledOut(NamedTuple):
  """What a step's generation gave."""
  rollouts: list[Rollout]   # all that were started
  learned: list[Rollout]    # those to learn from: all, or what dynamic sampling chose
  rounds: int = 1           # of prompts taken
  sec_reward: float = 0.0   # waited for grades after the last token
  chosen: tuple = ()        # of prompts that were chosen: Chosen, one a round


class Chosen(NamedTuple):
  """What was known of prompts when they were chosen."""
  states: np.ndarray   # f32[P,D]
  success: np.ndarray  # f32[P]    predicted


class Clock:
  """Wall-clock seconds of a step's phases; a lap waits for the arrays given."""

  def __init__(self):
    self.start = self.last = time.perf_counter()
    self.seconds = {}

  def lap(self, name: str, wait_for=None) -> None:
    jax.block_until_ready(wait_for)
    now = time.perf_counter()
    self.seconds[name], self.last = now - self.last, now

  def total(self) -> float:
    return time.perf_counter() - self.start


@dataclasses.dataclass
class TrainingStep:
  """step(state, roll_out, pruning, decay) -> (state, what was rolled out, metrics)."""
  engine: Engine
  config: StepConfig
  reference: dict | None = None  # the reference policy's parameters, where the loss has a KL term
  state: TrainState | None = None  # while a step runs, for `choose`

  def __call__(self, state: TrainState, roll_out: Callable, pruning: bool,
               decay: float = 1.0) -> tuple[TrainState, RolledOut, dict]:
    """roll_out(decide) -> RolledOut, with the engine loaded. pruning False scores and keeps every rollout. decay: what the
    learning rate of the schedule is multiplied with."""
    c, clock = self.config, Clock()

    # ---- 1. roll out
    self.state = state
    self.engine.load(state.policy, c.dtype)
    rolled = roll_out(decision.make_decide(state.params["head"], state.calibration, c.rule, pruning, features=True))
    self.engine.params = None  # the update needs the room
    share = c.rule.keep if pruning and c.rule.kind == "max_variance" else c.learn_keep
    if share < 1.0:
      rolled = rolled._replace(learned=down_sample(rolled.learned, share))
    clock.lap("sec_generate")
    clock.seconds["sec_generate"] -= rolled.sec_reward

    # ---- 2. to 4. batch, update, table
    state, metrics = self.learn(state, rolled, clock, decay)

    # ---- 5. metrics
    return state, rolled, rollout_metrics(rolled.rollouts, rolled.learned, c.rule.detect) | metrics | {
      "pruning": pruning, "rounds": rolled.rounds, "groups_learned": len({r.prompt for r in rolled.learned}),
      "sec_reward": rolled.sec_reward, **clock.seconds, "sec_step": clock.total()}

  def learn(self, state: TrainState, rolled: RolledOut, clock: Clock, decay: float = 1.0) -> tuple[TrainState, dict]:
    """What a step's rollouts teach: (state, metrics)."""
    c, model, now = self.config, self.engine.config, int(state.step)

    # ---- 2. batch
    parts = [batching.pack(part, c.shape, self.engine.mesh, c.update.loss, c.weigh, rolled.rollouts)
             for part in batching.minibatches(rolled.learned, c.minibatches, (c.seed, now))]
    examples = batching.head_examples(rolled.rollouts, state.params["head"], model.width, c.weigh, c.balance, c.short,
                                      len(c.rule.detect))
    clock.lap("sec_batch")
    warmth = np.float32(c.temperature)
    parts = [(update.fill_logprobs(c.update, state.policy, self.reference, batches, warmth), counts)
             for batches, counts in parts]
    clock.lap("sec_logprob", parts if self.reference or not c.update.fresh else None)

    # ---- 3. update
    taken, lr = [], decay * applied_rate(c.schedule, state)
    for epoch in range(c.epochs):
      for i in np.random.default_rng((c.seed, now, epoch)).permutation(len(parts)) if len(parts) > 1 else (0,):
        batches, counts = parts[i]
        state, one = update.step(c.update, state, batches, examples, counts | {"temperature": warmth}, c.optimizer, decay)
        taken.append(one)
    state = state.replace(step=jax.device_put(np.int32(now + 1), state.step.sharding))

    # ---- 4. table
    calibration = head_training.update_calibration(state.calibration, rolled.rollouts, c.half_life, c.weigh, len(c.rule.detect))
    state = state.replace(calibration=calibration)
    if c.strength is not None:
      taught = batching.linear_examples(rolled.rollouts, len(c.rule.detect), state.params["head"]["mean"].shape[1], c.weigh)
      head, sums = head_training.fit_linear(state.recent, *taught, np.float32(c.strength), c.head_half_life,
                                            np.float32(len(rolled.rollouts)))
      state = state.replace(params=state.params | {"head": head}, recent=sums)
    if c.head_optimizer:
      state = head_training.refit_head(state, examples, passes=c.passes, optimizer=c.head_optimizer)

    chosen = {}
    if rolled.chosen:
      states, q = (np.concatenate(x) for x in zip(*rolled.chosen, strict=True))
      chosen = {"prompt_variance": float(np.mean(q * (1 - q)))}
      state = state.replace(prompts=candidates.learn(state.prompts, rolled.rollouts, states, c.prompt_strength, c.head_half_life))
    sums = {k: sum(counts[k] for _, counts in parts) for k in ("trained", "rows_trained")}
    taken, norm = jax.device_get((taken, update.norm_of(state.params["head"])))
    metrics = {k: float(np.mean([one[k] for one in taken])) for k in taken[0]} | chosen
    if not sums["rows_trained"]:  # means over nothing
      metrics |= dict.fromkeys(("entropy", "clip_frac", "logprob_gap"), float("nan"))
    clock.lap("sec_update", state.step)
    return state, metrics | {"head_norm": float(norm), "lr": lr, "tokens_trained": sums["trained"],
                             "rows_trained": sums["rows_trained"]}

  def choose(self, prompts: list, count: int, key: jax.Array) -> tuple[list, Chosen]:
    """`count` of the candidates `prompts`, those whose own states promise most signal (METHOD 10.2), and what was known of them;
    called while rolling out, with the engine loaded."""
    states = self.engine.prompt_states([p.tokens for p in prompts], self.config.sampling)
    keep, q = candidates.choose(self.state.prompts, states, np.int32(count), np.float32(self.config.explore), key)
    index = np.flatnonzero(jax.device_get(keep))
    return [prompts[i] for i in index], Chosen(states[index], np.asarray(q)[index])
