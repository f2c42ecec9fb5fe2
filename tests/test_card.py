"""What a card needs, by count: beside what was measured, what the recipes say of three cards, the command."""

import importlib
import json
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
import pytest

from arrol_jax import assemble, assemble_state, config
from arrol_jax.models import sharding
from arrol_jax.models.files.weights import load_policy
from arrol_jax.models.zoo import ZOO
from arrol_jax.planning import card, compiling
from arrol_jax.planning.suggesting import as_flags
from arrol_jax.running.hosts import CARD_SHARE

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests/fixtures/qwen3_tied"
BIG = ZOO["qwen3-1.7b"]


def recipe(name="gsm8k_qwen3_06b", **changes):
  c = importlib.import_module(f"configs.{name}").get_config()
  c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
  return c


def measured(file, folder="engine", **want):
  lines = map(json.loads, (ROOT / "experiments/results" / folder / file).read_text().splitlines())
  return next(x["peak_bytes"] for x in lines if all(x.get(k) == v for k, v in want.items()))


LENGTHS = {"rollout__max_prompt": 256, "rollout__max_new": 1024, "optim__length_buckets": 1}


@pytest.mark.parametrize("rows, cache", [(64, None), (256, None), (256, "int8")])
def test_decoding_is_near_what_was_measured(rows, cache):
  """Of the benchmark, which holds nothing but the engine."""
  c = recipe(**LENGTHS, rollout__slots=rows, rollout__prompts=rows // 16, rollout__cache=cache)
  counted = sum(card.count(c, BIG, 10**12).phases["generation"].values())
  seen = measured("decode_h100.jsonl", rows=rows, max_new=1024, cache=cache or "bfloat16")
  assert 0.95 < counted / seen < 1.05


def test_the_update_is_not_counted_too_low():
  counted = card.count(recipe(**LENGTHS), BIG, 10**12).peak("update")
  assert 1.0 < counted / measured("update_h100.jsonl", rows=128, micro_tokens=16384, chunk_tokens=4096) < 1.15


def test_layers_one_by_one_are_counted_about_as_they_were_measured():
  def peaks(shape, scan):
    seen = measured("scan_layers_h100.jsonl", case="update", shape=shape, scan_layers=scan, remat="dots", micro_tokens=16384)
    return card.count(recipe(**LENGTHS, model__scan_layers=scan), ZOO[shape], 10**12).peak("update"), seen

  for shape in ("qwen3-1.7b", "qwen2.5-0.5b"):
    (scanned, seen), (counted, taken) = peaks(shape, True), peaks(shape, False)
    assert 0.9 < (counted - scanned) / (taken - seen) < 1.2 and counted > taken


@pytest.mark.parametrize("file", ["lora_h100.jsonl", "lora_h200.jsonl"])
def test_an_adapters_step_in_24_gb_is_not_counted_too_low(file):
  """The settings of the benchmark that was given 24 GB of a larger card, and the rows that it took."""
  c = recipe(model__lora__rank=16, optim__micro_tokens=8192, optim__chunk_tokens=1024, rollout__slots=144, rollout__max_new=512,
             rollout__max_prompt=320)
  needs, seen = card.count(c, BIG, 10**12), measured(file, "card", lora=16, slots=144)
  assert seen < 24e9 and 1.0 < max(map(needs.peak, needs.phases)) / seen < 1.06


def test_adapters_hold_two_bytes_a_frozen_weight():
  needs = card.count(recipe(model__lora__rank=16), BIG, 10**12)
  per_layer = 16 * ((2048 + 2048) + 2 * (2048 + 1024) + (2048 + 2048) + 3 * (2048 + 6144))
  adapters, head = 28 * per_layer, 2048 * 256 + 256 + 256 + 1
  assert needs.held["frozen weights"] == 2 * BIG.num_params()
  assert needs.held["trained weights, optimizer, head"] == pytest.approx(12 * (adapters + head), abs=10_000)  # and tables
  assert needs.phases["update"]["gradients"] == 2 * 4 * adapters and "weights in model.dtype" not in needs.phases["update"]
  with_kl = card.count(recipe(model__lora__rank=16, loss__kl_weight=0.1), BIG, 10**12)
  assert with_kl.held == needs.held  # the reference is the base


def test_what_runs_ahead_stays_while_the_policy_is_updated():
  """So it gets half of what is free, where it would take all."""
  plain, ahead = (card.count(recipe(**LENGTHS, rollout__slots=64, rollout__prompts=4, rollout__ahead=x), BIG, 10**12)
                  for x in (0, 1))
  for phase in ("update", "optimizer"):
    assert ahead.peak(phase) - plain.peak(phase) == plain.phases["generation"]["cache"] > 10**9
  assert ahead.peak("generation") == plain.peak("generation")
  many = {"rollout__prompts": 512, "rollout__max_new": 1024, "rollout__max_prompt": 256}
  rows = [card.count(recipe(**many, rollout__ahead=x), BIG, 80 * 10**9).slots for x in (0, 2)]
  assert 0.3 * rows[0] < rows[1] < 0.5 * rows[0]


def test_int8_decode_weights_are_half():
  """And a scale an output channel; nothing else changes."""
  plain, small = (card.count(recipe(rollout__slots=64, rollout__weights=x), BIG, 10**12).phases for x in (None, "int8"))
  before, after = (x["generation"].pop("weights to decode with") for x in (plain, small))
  assert 0.5 < after / before < 0.51 and plain == small


@pytest.mark.parametrize("name, shape", [("gsm8k_qwen3_06b", "qwen3-0.6b"), ("gsm8k_qwen25_05b", "qwen2.5-0.5b"),
                                         ("gsm8k_llama32_1b", "llama-3.2-1b")])
def test_recipes_say_what_the_plan_says(name, shape):
  """Settings and peak for 24, 40 and 80 GB stand in the config's docstring, each time as counted."""
  text = " ".join(importlib.import_module(f"configs.{name}").__doc__.split())
  for size in (24, 40, 80):
    c, limit = recipe(name), int(size * 1e9 * CARD_SHARE)
    needs = card.count(c, ZOO[shape], limit)
    fix = {} if card.fits(needs, limit) else card.what_fits(c, ZOO[shape], limit)
    needs = card.count(card.changed(c, fix), ZOO[shape], limit)
    assert card.fits(needs, limit)
    says = f"{' '.join(as_flags(fix)) or 'as it is'}: {max(map(needs.peak, card.PHASES)) / 1e9:.1f} GB"
    assert says in text and f"{size} GB" in text, says


def test_what_fits_costs_no_more_than_it_must():
  """Nothing smaller on the list fits; where nothing does, None."""
  limit = int(24e9 * CARD_SHARE)
  fix = card.what_fits(recipe(), BIG, limit)
  assert fix == {"model.lora.rank": 16, "optim.chunk_tokens": 1024, "optim.micro_tokens": 8192}
  assert not card.fits(card.count(card.changed(recipe(), fix | {"optim.micro_tokens": 16384}), BIG, limit), limit)
  assert card.what_fits(recipe(), BIG, 10**9) is None


def test_of_too_many_slots_as_many_are_left_as_fit():
  """Before adapters, which train something else."""
  limit, small = int(24e9 * CARD_SHARE), ZOO["qwen3-0.6b"]
  fix = card.what_fits(recipe(rollout__slots=4096), small, limit)
  without = card.what_fits(recipe(), small, limit)
  assert fix == without | {"rollout.slots": card.count(card.changed(recipe(), without), small, limit).slots}
  c, _ = config.parse(["plan", "--config=gsm8k_qwen3_06b", "--config.rollout.slots=4096", *as_flags(fix)])
  assert 16 <= c.rollout.slots < 4096 and card.fits(card.count(c, small, limit), limit)


def test_abstract_state_is_the_real_one_with_adapters():
  """Shapes, dtypes and shardings of what train.py holds, frozen base among it."""
  c = recipe(model__path=str(MODEL), model__lora__rank=2, quality__hidden=8)
  mesh = sharding.make_mesh(1, 4, 2)
  with jax.set_mesh(mesh):
    loaded = load_policy(MODEL, "bfloat16", mesh)
    plain, loaded.config = loaded.config, loaded.config.__class__(**vars(loaded.config) | {"lora": assemble.lora(c)})
    real = assemble_state.init_state(c, loaded, assemble.optimizer(c), mesh, keep_params=False)
    abstract = compiling.Step(c, plain, mesh, 1).loaded.config
    abstract = assemble_state.abstract_state(c, abstract, mesh)
  assert jax.tree.structure(real) == jax.tree.structure(abstract)
  for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(b.sharding, a.ndim)
  assert not np.any(real.params["policy"]["up_lora_b"]) and np.any(real.params["policy"]["up_lora_a"])


def plan(*arguments):
  return subprocess.run([sys.executable, "-m", "arrol_jax.plan", "--config=gsm8k_qwen3_06b", *arguments], cwd=ROOT,
                        capture_output=True, text=True)


def test_the_command(tmp_path):
  done = plan("--topology=gpu:24GB", "--shape=qwen3-1.7b", f"--json={tmp_path}/plan.json")
  assert done.returncode == 0, done.stderr
  assert "**Does not fit** gpu:24GB: one group of 16 rollouts needs" in done.stdout and "An estimate, by count" in done.stdout
  assert "It fits with --config.model.lora.rank=16 --config.optim.chunk_tokens=1024" in done.stdout
  said = json.loads((tmp_path / "plan.json").read_text())
  assert said["fits"] is False and said["fits_with"]["model.lora.rank"] == 16 and said["estimate"] is True
  assert [p["name"] for p in said["programs"]] == list(card.PHASES) and said["programs"][1]["peak"] > said["programs"][1]["limit"]


@pytest.mark.parametrize("arguments, word", [(["--topology=gpu:24"], "such as gpu:24GB"),
                                             (["--topology=gpu:0GB"], "such as gpu:24GB"),
                                             (["--topology=GPU:24GB"], "such as gpu:24GB"),
                                             (["--topology=h100:80GB"], "gpu:24GB for one card"),
                                             ([], "gpu:24GB for one card"),
                                             (["--topology=gpu:24GB", "--price=3"], "--price: for a card"),
                                             (["--topology=gpu:24GB", "--suggest=maybe"], "it takes yes or no"),
                                             (["--topology=gpu:24GB", "--json=/"], "Is a directory: '/'; --effort takes"),
                                             (["--topology=gpu:24GB", "--config.mesh.fsdp=8"], "is one card")])
def test_a_mistake_is_one_line(arguments, word, monkeypatch, capsys):
  from arrol_jax import plan as command
  monkeypatch.setattr(sys, "argv", ["plan", "--config=gsm8k_qwen3_06b", *arguments])
  monkeypatch.setattr(jax.config, "update", lambda *_: None)
  with pytest.raises(SystemExit) as e:
    config.run(command.main)
  err = capsys.readouterr().err
  assert e.value.code == 2 and word in err and len(err.splitlines()) == 1
