"""The adapter under JetStream's own orchestrator: each prompt gets the engine's tokens. Skipped without JetStream."""

import asyncio
import json
from pathlib import Path
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("jetstream.engine.engine_api")

from arrol_jax import assemble, config as configuration, jetstream  # noqa: E402
from arrol_jax.engine.scheduler import Request  # noqa: E402
from arrol_jax.types import UserError  # noqa: E402

PROMPTS = ["5+5-7-9+1>", "8-2+3>", "1-1-8+7+8>", "9>", "4+4+4-4>"]


def load():
  c, _ = configuration.parse(["prog", "--config=configs/quickstart.py", "--config.rollout.slots=8",
                              "--config.rollout.row_buckets=1", "--config.rollout.length_buckets=1"])
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh):
    loaded = assemble.load(c, mesh)
    return SimpleNamespace(c=c, loaded=loaded, engine=assemble.eval_engine(c, loaded, mesh, loaded.params))


@pytest.fixture(scope="module")
def parts():
  return load()


def greedy(parts, prompt):
  tokens = np.array(parts.loaded.tokenizer.encode(prompt), np.int32)
  with jax.set_mesh(parts.engine.mesh):
    return parts.engine.run([Request(0, 0, tokens, 48)], jax.random.key(0),
                            assemble.sampling(parts.c, parts.loaded, 0.0))[0].tokens


def adapter(parts, temperature, samples):
  sampling = assemble.sampling(parts.c, parts.loaded, temperature)
  return jetstream.RolloutEngine(parts.engine, sampling, parts.loaded.tokenizer, "x", samples)


async def drive(engine, prompts, most):
  """What the orchestrator answers: a list a prompt of a token list a sample."""
  from jetstream.core import orchestrator
  from jetstream.core.utils.async_multifuture import AsyncMultifuture
  params = [engine.load_params()]
  driver = orchestrator.Driver([engine], [engine], params, params, interleaved_mode=True, jax_padding=False)
  requests = [orchestrator.ActiveRequest(max_tokens=most, prefill_content=prompt, is_client_side_tokenization=True,
                                         return_channel=AsyncMultifuture()) for prompt in prompts]
  for request in requests:
    driver.place_request_on_prefill_queue(request)
  out = []
  for request in requests:
    out.append([[] for _ in range(engine.samples_per_slot)])
    async for step in request.return_channel:
      for tokens, sample in zip(out[-1], step, strict=True):
        tokens += sample.token_ids
  await asyncio.to_thread(driver.stop)
  return out


@pytest.fixture(scope="module")
def driven():
  """In a process of its own, with -O: the orchestrator kills its process when one of its assertions fails."""
  done = subprocess.run([sys.executable, "-O", "-m", "tests.test_jetstream"], cwd=Path(__file__).resolve().parents[1],
                        capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def test_the_orchestrator_gets_the_engines_tokens(parts, driven):
  """More prompts than slots, of different lengths; two samples a slot, greedy, are alike."""
  for said, prompt in zip(driven["greedy"], PROMPTS, strict=True):
    np.testing.assert_array_equal(said[0], greedy(parts, prompt))
    np.testing.assert_array_equal(said[1], said[0])


def test_samples_differ_and_lengths_hold(driven):
  for said in driven["sampled"]:
    assert len(said) == 4 and len({tuple(s) for s in said}) > 1
    assert all(len(s) == 12 or (len(s) < 12 and s[-1] == 18) for s in said)  # 18 ends a text


def test_multi_sampling_inserts_each_row_in_its_slot(parts):
  engine = adapter(parts, 0.0, 1)
  tokenizer = engine.build_tokenizer(engine.get_tokenizer())
  state, said, places = engine.init_decode_state(), {}, [(PROMPTS[0], [1, 4]), (PROMPTS[1], [0, 7])]
  for prompt, slots in places:
    tokens, length = tokenizer.encode(prompt, max_prefill_length=16, jax_padding=False)
    prefix, first = engine.prefill_multisampling(params=engine.load_params(), padded_tokens=tokens, true_length=length,
                                                 num_samples=2)
    said |= {slot: [int(t)] for slot, t in zip(slots, first.get_result_at_slot(0).tokens[:, 0], strict=True)}
    state = engine.bulk_insert(prefix, state, slots=slots)
  for _ in range(8):
    state, out = engine.generate(engine.load_params(), state)
    for slot, tokens in said.items():
      tokens.append(int(out.get_result_at_slot(slot).tokens[0, 0]))
  for prompt, slots in places:
    for slot in slots:
      np.testing.assert_array_equal(said[slot], greedy(parts, prompt)[:9])


def test_a_prompt_too_long_keeps_its_end(parts):
  engine = adapter(parts, 0.0, 1)
  text = "7+" * 12 + PROMPTS[0]
  tokens, length = engine.build_tokenizer(None).encode(text, max_prefill_length=16, jax_padding=False)
  assert len(tokens) == 16 and length > 16
  prefix, first = engine.prefill(params=engine.load_params(), padded_tokens=tokens, true_length=length)
  assert int(prefix.position[0]) == 16 and int(first.data[0, 0]) == greedy(parts, text[-16:])[0]


def test_shapes_that_jetstream_cannot_have(parts):
  with pytest.raises(UserError, match="do not divide"):
    adapter(parts, 0.0, 3)


if __name__ == "__main__":
  mine = load()
  print(json.dumps({"greedy": asyncio.run(drive(adapter(mine, 0.0, 2), PROMPTS, 60)),
                    "sampled": asyncio.run(drive(adapter(mine, 1.5, 4), PROMPTS[:3], 12))}), flush=True)
