"""Collects what votes can be weighed by: sampled traces of training and test problems, with what the engine read at their ends.

  python -m experiments.vote_samples --config=configs/gsm8k_qwen05b.py --prompts=640 --test=660 --seconds=120 --out=DIR \\
    --config.model.path=DIR/model.gguf --config.data.train=DIR/gsm8k_train.jsonl --config.data.eval=DIR/gsm8k_test.jsonl

One H100, about 90 s. The policy is --config.model.path: a model, or a run's exported policy, whose own head is
then asked too. --config.rollout.group_size traces a problem at rollout.temperature, nothing pruned, graded; problems are drawn by
the seed, and come by turns from both files, so that --seconds, which ends the sampling, leaves some of both.

DIR/rollouts.npz holds all but the traces' states, DIR/states_0.npz and on those, each below 15 MB; experiments/vote_weights.py
goes on from these files alone, without the model. States are less the training traces' mean and by their deviation, in
sixteenths, cut at 7.9 deviations: a ridge hardly sees the difference (tests/test_vote_weights.py).
"""

import json
import os
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from arrol_jax import assemble, config as configuration
from arrol_jax.learning.generation import generate
from arrol_jax.models import sharding
from arrol_jax.pruning import features, linear_head, table
from arrol_jax.pruning.head import is_linear
from arrol_jax.rewards import extract_answer
from arrol_jax.types import Rollout, UserError
from experiments.head_ablation import drawn, reader

READ = "mean@2/3,mean@3/4,last@2/3,prompt@2/3,logprobs,windows,siblings"
CHUNK = 4         # times rollout.prompts: problems that are sampled together
PART = 14e6       # bytes of a file of states, at most
PACKED = 0.85     # of its size that a file of states takes at most when it is compressed
STEP = 16         # a deviation, as it is stored
SAVING = 10.0     # seconds that are kept for writing


class Samples(NamedTuple):
  """Traces of P problems, G each; training problems first."""
  test: np.ndarray          # bool[P]
  success: np.ndarray       # f32[P,G]  in {0, 1}
  answers: list             # [P][G] of str, None where a trace has no answer
  inputs: dict              # name -> f32 or i8 [P,G,F], a prompt's state [P,1,F]: in any unit
  confidences: np.ndarray   # f32[tokens of all traces, one after the other]  DeepConf's
  tokens: np.ndarray        # i32[P,G]  how many a trace has
  own: np.ndarray | None    # f32[P,G,2]  logit and posterior by the policy's own head; None: it has none
  about: dict               # model, device, command

  def part(self, which: np.ndarray) -> "Samples":
    """Only the problems in `which` bool[P]."""
    of_trace = np.repeat(np.repeat(which, self.tokens.shape[1]), self.tokens.reshape(-1))
    return Samples(self.test[which], self.success[which], [a for a, w in zip(self.answers, which, strict=True) if w],
                   {name: x[which] for name, x in self.inputs.items()}, self.confidences[of_trace], self.tokens[which],
                   None if self.own is None else self.own[which], self.about)


# ---- collecting


def collect(c, inputs: tuple[str, ...], counts: tuple[int, int], deadline: float, skip: int = 0) -> Samples:
  """Samples of counts = (training, test) problems; no chunk is begun that would not end by `deadline` (time.monotonic).

  skip: so many test problems, the first that the seed draws, are left out. At least a chunk of both is there. Raises UserError
  where there are fewer problems.
  """
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh), assemble.grader(c) as grader:
    loaded = assemble.load(c, mesh, training=True)
    layout = parts_of(inputs, loaded.config.layers, loaded.config.width)
    prompts = [drawn(c, loaded, counts[0]), drawn(c, loaded, skip + counts[1], c.data.eval)[skip:]]
    c.quality.fit, c.quality.inputs, c.prune.rule = "ridge", inputs, "confidence"  # so that sampling keeps what is read
    engine = assemble.engine(c, loaded, mesh, c.rollout.max_new, loaded.params)
    engine.load(loaded.params, c.model.dtype)
    decide = reader((c.rollout.max_new + 1,), inputs, loaded.config.width)  # nobody gets there
    how = assemble.sampling(c, loaded, c.rollout.temperature), assemble.grading(c, loaded, grader), decide
    found, took = ([], []), 0.0
    with tqdm(total=sum(counts) * c.rollout.group_size, desc="traces", unit="trace") as bar:
      for n, (kind, some) in enumerate(turns(prompts, CHUNK * c.rollout.prompts)):
        started = time.monotonic()
        if all(found) and started + took > deadline - SAVING:
          print("the seconds are over: what is missing is left out", flush=True)
          break
        found[kind].extend(generate(engine, dict(enumerate(some)), c.rollout.group_size, assemble.key(c, assemble.EVAL, n), *how,
                                    lambda _: bar.update())[0])
        took = time.monotonic() - started
  return pack(found, c.rollout.group_size, layout, c.reward.pattern, own_head(loaded, layout))


def turns(prompts: list[list], size: int):
  """(kind, chunk) of both lists by turns, in proportion."""
  chunks = [[x[i:i + size] for i in range(0, len(x), size)] for x in prompts]
  order = sorted(((i + 0.5) / len(x), kind, i) for kind, x in enumerate(chunks) for i in range(len(x)))
  return [(kind, chunks[kind][i]) for _, kind, i in order]


def parts_of(inputs: tuple[str, ...], layers: int, width: int) -> dict[str, slice]:
  """Where each input's columns stand. Raises UserError for an unknown one."""
  try:
    features.parse(inputs, layers)
  except ValueError as e:
    raise UserError(f"--inputs: {e}") from e
  ends = np.cumsum([features.width((name,), width) for name in inputs]).tolist()
  return {name: slice(end - features.width((name,), width), end) for name, end in zip(inputs, ends, strict=True)}


def own_head(loaded, layout: dict[str, slice]):
  """score(x f32[R,F]) -> f32[R,2], logit and posterior by the last token's own head and table; None: the policy has no linear
  head, or it reads what was not asked for."""
  head, names = loaded.head, tuple(loaded.head_inputs or ())
  if head is None or not is_linear(head) or not names or set(names) - set(layout):
    return None
  last = linear_head.LinearHead(**{k: np.asarray(head[k])[-1] for k in linear_head.NAMES})
  counts = table.Calibration() if loaded.calibration is None else jax.tree.map(
    lambda x: np.atleast_2d(np.asarray(x))[-1], loaded.calibration)

  def score(x):
    logit = linear_head.alone(last, np.concatenate([x[:, layout[name]] for name in names], axis=1))
    return np.stack([np.asarray(logit), np.asarray(table.posterior(counts, logit))], axis=1)

  return score


def pack(found: tuple[list[Rollout], list[Rollout]], group: int, layout: dict[str, slice], pattern: str | None,
         own=None) -> Samples:
  """Samples of training and test rollouts, groups one after the other."""
  rollouts, rows = [*found[0], *found[1]], lambda x: np.asarray(x).reshape(-1, group, *np.shape(x)[1:])
  x = np.stack([np.asarray(r.final_features, np.float32) for r in rollouts])
  inputs = {}
  for name, part in layout.items():
    of_all = rows(stored(x[:, part], len(found[0])) if is_state(name) else x[:, part])
    inputs[name] = of_all[:, :1] if name.startswith("prompt") else of_all
  answers = [extract_answer(r.text, pattern) for r in rollouts]
  return Samples(np.repeat([False, True], [len(f) // group for f in found]),
                 rows([r.success for r in rollouts]).astype(np.float32),
                 [answers[i:i + group] for i in range(0, len(answers), group)], inputs,
                 np.concatenate([r.confidences for r in rollouts]), rows([len(r.tokens) for r in rollouts]).astype(np.int32),
                 None if own is None else rows(own(x)), {})


def is_state(name: str) -> bool:
  """Whether an input is as wide as the model."""
  return features.PLAIN.get(name) is None


def stored(x: np.ndarray, training: int) -> np.ndarray:
  """x f32[R,F] in sixteenths of the deviation from the mean over the first `training` rows, i8[R,F]."""
  x = x - x[:training].mean(axis=0)
  scale = x[:training].std(axis=0)
  scale = np.where(scale > 0, STEP / np.where(scale > 0, scale, 1.0), 0.0)
  return np.clip(np.rint(x * scale), -127, 127).astype(np.int8)


# ---- files


def save(samples: Samples, folder: str) -> list[str]:
  """Writes the files; the paths."""
  states = {name: x for name, x in samples.inputs.items() if is_state(name) and x.shape[1] > 1}
  narrow = {f"input {name}": x for name, x in samples.inputs.items() if name not in states}
  text = json.dumps({"answers": samples.answers, "about": samples.about, "states": list(states)})
  os.makedirs(folder, exist_ok=True)
  own = {} if samples.own is None else {"own": samples.own.astype(np.float32)}
  paths = [f"{folder}/rollouts.npz"]
  np.savez_compressed(paths[0], test=samples.test, success=samples.success.astype(np.uint8),
                      confidences=samples.confidences.astype(np.float16), tokens=samples.tokens,
                      text=np.frombuffer(text.encode(), np.uint8), **own, **narrow)
  parts = max(1, int(-(-PACKED * sum(x.nbytes for x in states.values()) // PART))) if states else 0
  for n in range(parts):
    paths.append(f"{folder}/states_{n}.npz")
    np.savez_compressed(paths[-1], **{str(i): np.array_split(x, parts)[n] for i, x in enumerate(states.values())})
  return paths


def load(folder: str) -> Samples:
  """What `save` wrote. Raises UserError where there is nothing."""
  try:
    with np.load(f"{folder}/rollouts.npz") as f:
      kept = dict(f)
    text, parts = json.loads(kept["text"].tobytes()), []
    for n in range(len([name for name in os.listdir(folder) if name.startswith("states_")])):
      with np.load(f"{folder}/states_{n}.npz") as f:
        parts.append(dict(f))
  except (OSError, ValueError, KeyError) as e:
    raise UserError(f"{folder}: no samples there ({e}); python -m experiments.vote_samples makes them") from e
  inputs = {name.removeprefix("input "): x for name, x in kept.items() if name.startswith("input ")}
  inputs |= {name: np.concatenate([p[str(i)] for p in parts]) for i, name in enumerate(text["states"])}
  return Samples(kept["test"], kept["success"].astype(np.float32), text["answers"], inputs,
                 kept["confidences"].astype(np.float32), kept["tokens"], kept.get("own"), text["about"])


FLAGS = {"prompts": ("640", "how many training problems (data.train)"), "test": ("660", "how many test problems (data.eval)"),
         "skip": ("0", "so many test problems, the first that the seed draws, are left out: earlier samples had them"),
         "inputs": (READ, "what is read at a trace's last token: inputs of quality.fit=ridge"),
         "seconds": ("300", "no sampling is begun that would not end in so many"),
         "out": ("runs/votes", "folder for the files")}


def main():
  started = time.monotonic()
  c, flags = configuration.parse(sys.argv, FLAGS, __doc__)
  configuration.check(c)
  try:
    counts, skip, seconds = (int(flags.prompts), int(flags.test)), int(flags.skip), float(flags.seconds)
  except ValueError as e:
    raise UserError("--prompts, --test, --skip and --seconds take numbers") from e
  if min(counts) < 1 or not seconds > 0 or skip < 0:
    raise UserError("--prompts, --test and --seconds: more than 0; --skip: not below it")
  if not c.data.eval:
    raise UserError("data.eval: name the test problems")
  if c.rollout.group_size < 2:
    raise UserError("rollout.group_size: a vote needs 2 traces at least")
  samples = collect(c, tuple(flags.inputs.split(",")), counts, started + seconds, skip)
  about = {"model": os.path.basename(os.path.normpath(c.model.path)), "device": jax.devices()[0].device_kind,
           "platform": sharding.platform(), "jax": jax.__version__, "seconds": round(time.monotonic() - started, 1),
           "temperature": c.rollout.temperature, "max_new": c.rollout.max_new, "seed": c.seed,
           "command": "python -m experiments.vote_samples " +
           " ".join(a for a in sys.argv[1:] if "path" not in a and "data." not in a and "--out" not in a)}
  for path in save(samples._replace(about=about), flags.out):
    print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB")
  rate = lambda test: samples.success[samples.test == test].mean()
  print(f"{(~samples.test).sum()} training problems, {rate(False):.1%} of their traces right; {samples.test.sum()} test "
        f"problems, {rate(True):.1%}; after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
  configuration.run(main)
