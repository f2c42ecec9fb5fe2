"""From a checked config to the parts that entry points work with: policy, mesh, engine, prompts, settings.

assemble_state.py and assemble_service.py are its other parts. Beside these, the entry points, course.py and the two packages that
look at a run beforehand (preflight, planning) nothing reads the config: all below takes plain arguments.
"""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
from tqdm import tqdm

from arrol_jax import step_programs
from arrol_jax.config_ranges import value_of
from arrol_jax.data import sources
from arrol_jax.data.problems import Prompt, digests, encode_prompts, lost
from arrol_jax.engine.memory import slots_that_fit
from arrol_jax.engine.sampling import Sampling, Taps
from arrol_jax.engine.scheduler import Engine, everywhere
from arrol_jax.learning import candidates as choosing, optimizers
from arrol_jax.learning.batching import PackShape
from arrol_jax.learning.evaluation import measure
from arrol_jax.learning.generation import Asked, Grading
from arrol_jax.learning.losses import ALGORITHMS, LossConfig
from arrol_jax.learning.update import Compute, UpdateConfig
from arrol_jax.models import sharding
from arrol_jax.models.files import hub
from arrol_jax.models.files.tokenizers import check_ids
from arrol_jax.models.files.weights import Policy, open_policy
from arrol_jax.models.lora import Lora
from arrol_jax.pruning import features
from arrol_jax.pruning.decision import Voters
from arrol_jax.pruning.head import inputs_of, is_linear
from arrol_jax.pruning.rule import RULES, PruneRule
from arrol_jax.pruning.table import Calibration
from arrol_jax.rewards import Grader
from arrol_jax.rewards.worker import source_digest
from arrol_jax.running import checkpoint, hosts, kept
from arrol_jax.running.checkpoint import digest
from arrol_jax.step import StepConfig
from arrol_jax.types import TrainState, UserError

TRAIN, EVAL, INIT, CHOICE, ADAPTERS = range(5)  # purposes of random keys
TOP_K = 20  # DeepConf's, as its authors' servers report them


def make_mesh(c: ConfigDict) -> jax.sharding.Mesh:
  hosts.check_devices()
  check_attention(c, jax.default_backend())
  try:
    return sharding.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
  except ValueError as e:
    raise UserError(f"mesh: {e}") from e


def check_attention(c: ConfigDict, platform: str) -> None:
  """UserError for a way to attend that the device cannot run, or only interpreted: hundreds of times slower."""
  for key, of in (("model.attention", {"cudnn": "gpu", "splash": "tpu"}), ("rollout.attention", {"triton": "gpu", "tpu": "tpu"})):
    value = value_of(c, key)
    if of.get(value, platform) != platform:
      fit = ", ".join(["xla", *(name for name, place in of.items() if place == platform)])
      raise UserError(f"{key}={value} needs {'an NVIDIA GPU' if of[value] == 'gpu' else 'a TPU'} and this is a {platform}, which "
                      f"can run {fit}; auto takes what fits")
  if c.model.attention == "cudnn" and c.model.dtype == "float32":
    raise UserError("model.attention=cudnn computes in bfloat16 and model.dtype is float32; auto takes what fits")


def load(c: ConfigDict, mesh: jax.sharding.Mesh, training: bool = False) -> Policy:
  """The policy on the mesh, with float32 parameters, or where adapters are to be trained with a frozen base in model.dtype; it
  must bring a tokenizer, stop tokens that it knows, and positions for the longest row.

  training: rows are those of rollouts, and of evaluations where there are any; else those of evaluations alone.
  """
  loaded = opened(c, training)
  read_weights(c, loaded, mesh, training)
  return loaded


def read_weights(c: ConfigDict, loaded: Policy, mesh: jax.sharding.Mesh, training: bool = False) -> None:
  """Makes of what is `opened` what is `load`ed."""
  loaded.read(c.model.dtype if training and c.model.lora.rank else "float32", mesh)


def opened(c: ConfigDict, training: bool = False) -> Policy:
  """`load` that reads headers alone: its parameters are shapes, of which nobody knows yet whether they are finite."""
  loaded = open_policy(hub.local(c.model.path), longest_row(c, training, not training or c.data.eval != ""))
  loaded.config = dataclasses.replace(loaded.config, lora=lora(c) if training else None)
  if loaded.tokenizer is None:
    raise UserError(f"{c.model.path} has no tokenizer; put the model's tokenizer files beside its weights")
  check_ids(c.model.path, loaded.tokenizer, loaded.eos_ids, loaded.config.vocab, "a response may end with")
  return loaded


def lora(c: ConfigDict) -> Lora | None:
  """The adapters that are trained; None: all of the policy is."""
  x = c.model.lora
  return Lora(x.rank, x.alpha, tuple(x.targets)) if x.rank else None


def longest_row(c: ConfigDict, training: bool, held_out: bool) -> int:
  """Tokens of a prompt with its response, at most."""
  return c.rollout.max_prompt + max(c.rollout.max_new * training, (c.eval.max_new or c.rollout.max_new) * held_out)


def grader(c: ConfigDict) -> Grader:
  r = c.reward
  return Grader(r.workers, r.pattern, r.timeout, r.memory, r.function, r.success)


def grading(c: ConfigDict, loaded: Policy, grader: Grader) -> Grading:
  """What turns the policy's responses into rewards."""
  return Grading(loaded.tokenizer, grader, c.reward.pattern, c.reward.success, c.reward.function)


def prompts(c: ConfigDict, loaded: Policy, path: str, limit: int = 0, split: str = "test") -> list[Prompt]:
  """Encoded problems of the sources `path`, used to "train" or to "test", each process encoding its share; says how many were
  too long and left out."""
  out, skipped = encoded(c, loaded, path, limit, split)
  if skipped:
    hosts.say(f"{path}: skipped {len(skipped)} of {len(out) + len(skipped)} prompts longer than {c.rollout.max_prompt} tokens "
              "(rollout.max_prompt)")
  return out


def encoded(c: ConfigDict, loaded: Policy, path: str, limit: int = 0, split: str = "test") -> tuple[list[Prompt], list[Prompt]]:
  """`prompts` that says nothing, and those that were left out."""
  problems = hosts.together(lambda: sources.load_problems(path, split, c.data.folder, c.data.tfds_dir))[:limit or None]
  out, skipped = encode_prompts(problems, loaded.tokenizer, c.data.template, c.data.chat, c.rollout.max_prompt,
                                c.data.system, c.data.thinking, spread=hosts.spread)
  for one in (p for p in out if p.tokens.max() >= loaded.config.vocab):
    check_ids(f"{path}, problem {one.problem.id!r}", loaded.tokenizer, one.tokens, loaded.config.vocab, "its prompt holds")
  return out, skipped


def inputs(c: ConfigDict, loaded: Policy, train: list[Prompt], held_out: dict[str, list[Prompt]]) -> dict[str, str]:
  """Hashes of what a run begins with (workdir.INPUTS) and is evaluated by (EVALUATED_BY). All processes must call it."""
  problems, tokens = digests(train)
  m = loaded.config  # what its weights' shapes do not tell
  model = repr((m.heads, m.kv_heads, m.head_dim, m.rope_theta, m.rope_scaling, m.norm_eps, sorted(map(int, loaded.eos_ids))))
  return {"problems": problems, "tokens": tokens, "weights": digest(loaded.params),
          "model": hashlib.sha256(model.encode()).hexdigest()[:16],
          "held_out": "".join(digests([p for prompts in held_out.values() for p in prompts])),
          **({"reward": source} if (source := source_digest(c.reward.function)) else {})}


def warn(c: ConfigDict, loaded: Policy, prompts: list[Prompt]) -> None:
  """Prints `warnings`."""
  for text in warnings(c, loaded, prompts):
    hosts.warn(text)


def warnings(c: ConfigDict, loaded: Policy, prompts: list[Prompt]) -> list[str]:
  """A line for each thing about the tokenizer or its chat template that trains or evaluates something else than is meant."""
  out = []
  stops, bos, text = loaded.eos_ids, getattr(loaded.tokenizer, "bos_token_id", None), loaded.tokenizer.convert_ids_to_tokens
  if not stops:
    out.append("the model's files name no stop token, so every response goes on to max_new: set eos_token_id in "
               "generation_config.json, or eos_token in tokenizer_config.json")
  ended = [p for p in prompts if p.tokens[-1] in stops]
  if ended:
    out.append(f"{len(ended)} of {len(prompts)} prompts end with the stop token {text(int(ended[0].tokens[-1]))!r}, after which "
               "there is nothing to say: set add_eos_token to false in tokenizer_config.json, or take it out of data.template")
  twice = sum(len(p.tokens) > 1 and p.tokens[0] == p.tokens[1] == bos for p in prompts)
  if twice:
    out.append(f"{twice} of {len(prompts)} prompts begin with {text(bos)!r} twice, as the tokenizer or the chat template writes "
               "one too: take it out of data.template and the problems, or set add_bos_token to false in tokenizer_config.json")
  return out + (lost(prompts, loaded.tokenizer, c.data.system) if prompts else [])


def engine(c: ConfigDict, loaded: Policy, mesh: jax.sharding.Mesh, max_new: int, params: dict,
           memory: tuple[int, int] | None = None, to_come: int = 0) -> Engine:
  """An engine for the policy in training, `params`, arrays or shapes; call it with all in place that stays in memory while it
  runs but for `to_come` bytes a device, or with what `memory` a device has (memory.slots_that_fit)."""
  r = c.rollout
  most = r.prompts * r.group_size
  build = lambda rows: Engine(loaded.config, mesh, rows, r.max_prompt, max_new, r.segment, r.row_buckets, r.length_buckets,
                              prefill_rows=min(r.prompts, 32), weights=r.weights)
  if r.slots is not None:
    return build(r.slots)
  # What runs ahead stays while the update needs room too.
  fits = slots_that_fit(build(most), sampling(c, loaded), r.group_size, params, memory, 0.5 if r.ahead else 1.0, to_come)
  return build(most if fits is None else min(most, fits))


def eval_engine(c: ConfigDict, loaded: Policy, mesh: jax.sharding.Mesh, params: dict) -> Engine:
  """An engine for held-out problems, loaded with `params`."""
  out = engine(c, loaded, mesh, c.eval.max_new or c.rollout.max_new, params)
  out.load(params, c.model.dtype)
  return out


def voters(c: ConfigDict, head: dict | None, tables: Calibration | None) -> Voters:
  return Voters(head, tables, detect(c), c.eval.stop_below, c.eval.window, linear_inputs(c))


def accuracy(c: ConfigDict, loaded: Policy, engine: Engine, prompts: list[Prompt], grader, name: str,
             head: dict | None = None, tables: Calibration | None = None) -> dict:
  """`evaluation.measure` as eval.* says, with a progress bar called `name`."""
  how = dataclasses.replace(sampling(c, loaded), confidence=TOP_K if c.eval.deepconf else None, pool=pools(c, head))
  with tqdm(total=len(prompts) * c.eval.samples, desc=name, unit="response", leave=False,
            disable=not hosts.first()) as bar:
    asked = Asked(c.eval.samples, c.eval.temperature)
    found = measure(engine, prompts, asked, key(c, EVAL), how, grading(c, loaded, grader), voters(c, head, tables),
                    lambda _: bar.update())[0]
  if 0 < found.get("ungraded", 0) <= 0.5:  # of more the grading has told
    hosts.warn(f"{name}: {100 * found['ungraded']:.2g}% of the answers could not be graded and count as wrong")
  return found


def sampled(c: ConfigDict) -> ConfigDict:
  """The config of an evaluation that draws eval.sampled responses a problem as rollouts are drawn."""
  out = c.copy_and_resolve_references()
  out.eval.samples, out.eval.temperature = c.eval.sampled, c.rollout.temperature
  return out


def pools(c: ConfigDict, head: dict | None) -> bool:
  """Whether a head reads the mean of the states after the final norm."""
  return head is not None and "mean" in (linear_inputs(c) if is_linear(head) else inputs_of(head))


def follow_head(c: ConfigDict, loaded: Policy) -> None:
  """Sets what the config says of the quality head to what the policy's own head was trained with, as far as its folder tells.

  Raises UserError where the head is linear and nothing says what it reads, or where its lengths do not fit rollout.segment.
  """
  if loaded.head is not None and loaded.head_inputs:
    c.quality.fit, c.quality.inputs = "ridge" if is_linear(loaded.head) else "adam", loaded.head_inputs
    c.prune.detect = loaded.detect or c.prune.detect
  if loaded.head is not None and is_linear(loaded.head) and c.quality.fit != "ridge":
    raise UserError(f"the quality head of {c.model.path} is linear and its folder does not say what it reads; give the "
                    "quality.fit, quality.inputs and prune.detect that it was trained with")
  if any(n % c.rollout.segment for n in detect(c)):
    raise UserError(f"the quality head was trained at {detect(c)} response tokens; each must be a multiple of rollout.segment "
                    f"({c.rollout.segment})")


def check_tables(c: ConfigDict, loaded: Policy) -> None:
  """Raises UserError unless the policy has a calibration table for each of prune.detect's lengths, or none at all."""
  if loaded.calibration is not None:
    tables = jnp.atleast_2d(loaded.calibration.positive).shape[0]
    if tables != len(detect(c)) + (c.quality.fit == "ridge"):
      raise UserError(f"the policy's quality head has calibration tables of {tables} detection lengths and prune.detect is "
                      f"{tuple(c.prune.detect)}; give the lengths that it was trained with")


def sampling(c: ConfigDict, loaded: Policy, temperature: float | None = None) -> Sampling:
  """How tokens are drawn. temperature None: each request's own, so that training and evaluation share programs."""
  r = c.rollout
  return Sampling(temperature, tuple(loaded.eos_ids), c.model.dtype, r.cache, r.attention, r.top_k, r.top_p or 1.0, r.min_p,
                  TOP_K if c.prune.rule == "confidence" else None, "mean" in c.quality.inputs,
                  taps(c, loaded.config.layers))


def prune_rule(c: ConfigDict) -> PruneRule:
  p = c.prune
  return PruneRule(detect(c), p.keep, p.target, p.strength, p.p_min, p.p_max, p.rule, p.draw, p.floor, p.holdout,
                   linear_inputs(c), c.rollout.group_size)


def detect(c: ConfigDict) -> tuple[int, ...]:
  """Response lengths of the decisions; a decision at 0 is the choice of prompts (rollout.candidates)."""
  return tuple(n for n in c.prune.detect if n)


def taps(c: ConfigDict, layers: int) -> Taps:
  """What decoding keeps for the head and for the choice of prompts."""
  out = features.plan(linear_inputs(c), layers)
  if candidates(c) > c.rollout.prompts and out.prompt is None:
    out = out._replace(prompt=features.parse((f"prompt@{c.rollout.candidate_layer}",), layers)[0].layer)
  return out


def candidates(c: ConfigDict) -> int:
  """Prompts looked at a step; more than are rolled out where prompts are chosen."""
  r = c.rollout
  return r.candidates or (2 * r.prompts if 0 in c.prune.detect else r.prompts)


def linear_inputs(c: ConfigDict) -> tuple[str, ...]:
  """What a linear head reads; () where the head is the published one."""
  return tuple(c.quality.inputs) if c.quality.fit == "ridge" else ()


def loss(c: ConfigDict) -> LossConfig:
  given = {k: v for k, v in c.loss.items() if k != "name" and v is not None}
  return dataclasses.replace(ALGORITHMS[c.loss.name], longest=c.rollout.max_new, **given)


def step_config(c: ConfigDict, loaded: Policy) -> StepConfig:
  """What a training step does."""
  return StepConfig(
    dtype=c.model.dtype, sampling=sampling(c, loaded), temperature=c.rollout.temperature, rule=prune_rule(c),
    update=UpdateConfig(loaded.config, loss(c), compute(c), fresh=c.optim.epochs * c.optim.minibatches == 1),
    shape=pack_shape(c), optimizer=optimizer(c),
    head_optimizer=head_optimizer(c) if c.quality.buffer and c.quality.fit == "adam" else None,
    strength=c.quality.strength if c.quality.fit == "ridge" else None, head_half_life=c.quality.half_life,
    learn_keep=c.learn.keep, explore=c.rollout.explore, prompt_strength=c.quality.strength,
    passes=c.quality.passes, weigh=tuple(c.prune.weigh), balance=c.quality.balance, short=c.quality.short,
    half_life=c.prune.half_life, epochs=c.optim.epochs, minibatches=c.optim.minibatches, schedule=schedule(c), seed=c.seed)


def programs(c: ConfigDict, engine: Engine, config: StepConfig, state: TrainState) -> list[step_programs.Program]:
  """All that a run's steps will compile."""
  r, mesh = c.rollout, engine.mesh
  started = r.prompts * r.group_size
  out = step_programs.generation_programs(engine, config, state, r.prompts, r.group_size, everything=True)
  out += step_programs.training_programs(mesh, config, state, started, started, everything=True)
  if state.prompts is not None:
    out += choosing_programs(c, engine, state)
  return out + [step_programs.Program("checksums", checkpoint.checksums, lambda _: (checkpoint.plain(state),), {}, small=True)]


def shelf(c: ConfigDict, mesh: jax.sharding.Mesh) -> kept.Shelf | None:
  """Where a run's programs are kept; None where they are not: a rule of the user's own may be another one by the next time."""
  return kept.shelf(mesh) if c.prune.rule in RULES else None


def choosing_programs(c: ConfigDict, engine: Engine, state: TrainState) -> list[step_programs.Program]:
  """What choosing prompts runs (learning/candidates.py)."""
  states, shares = np.zeros((candidates(c), engine.config.width), np.float32), np.zeros(c.rollout.prompts, np.float32)
  learnt, number = states[:c.rollout.prompts], np.float32(0)
  listed = [("prompt states", everywhere(engine.mesh), lambda out: (out["prefill"].state,), ("prefill",)),
            ("choose prompts", choosing.choose, lambda _: (state.prompts, states, np.int32(0), number, key(c, CHOICE, 0)), ()),
            ("learn of prompts", choosing.fit, lambda _: (
              state.prompts, learnt, shares, shares, number, number, c.quality.half_life), ())]
  return [step_programs.Program(name, jitted, args, {}, needs, small=True) for name, jitted, args, needs in listed]


def compute(c: ConfigDict) -> Compute:
  return Compute(c.model.dtype, c.model.attention, c.model.remat, c.optim.chunk_tokens, c.model.scan_layers)


def pack_shape(c: ConfigDict) -> PackShape:
  return PackShape(c.rollout.max_prompt + c.rollout.max_new, c.optim.micro_tokens, c.optim.length_buckets, c.optim.tail_sizes)


def key(c: ConfigDict, purpose: int, step: int = 0) -> jax.Array:
  """The random key of one use: a function of (seed, purpose, step) alone."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(c.seed), purpose), step)


def optimizer(c: ConfigDict) -> optimizers.Optimizer:
  o = c.optim
  head_lr = o.head_lr if c.quality.fit == "adam" else 0.0  # the ridge has no gradient
  return optimizers.Optimizer(schedule(c), head_lr, o.clip_norm, o.weight_decay, o.b1, o.b2)


def schedule(c: ConfigDict) -> optimizers.RateSchedule:
  """The policy's learning rate by optimizer steps taken; where a run ends by seconds only its warm-up, see `decay`."""
  o = c.optim
  return optimizers.RateSchedule("constant" if c.stop_seconds else o.schedule, o.lr, o.warmup, c.steps, o.epochs * o.minibatches)


def decay(c: ConfigDict, step: int, seconds: float) -> float:
  """What a run that ends by seconds multiplies that rate with in its step number `step` (from 0), `seconds` of steps behind it:
  its schedule goes by seconds, or by steps where these end it sooner."""
  if not c.stop_seconds:
    return 1.0
  steps = (step - c.optim.warmup) / max(c.steps - c.optim.warmup, 1)
  return float(optimizers.decay(c.optim.schedule, max(seconds / c.stop_seconds, steps)))


def head_optimizer(c: ConfigDict) -> optax.GradientTransformation:
  """What goes over the head's buffer."""
  return optax.adamw(c.optim.head_lr, weight_decay=c.quality.weight_decay)
