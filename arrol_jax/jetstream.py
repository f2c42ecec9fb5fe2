"""The engine's programs as a JetStream engine: for its orchestrator, gRPC server and clients (google/JetStream at acd4f5a).

  python -O -m arrol_jax.jetstream --config=configs/NAME.py --port=9000 [--workdir=DIR] [--samples=G]
Needs JetStream, see experiments/results/serve/README.md; nothing else imports this module. -O, because the orchestrator asserts
what a race makes false. Its server listens on every address of the machine.

A JetStream slot is `samples` rows with one prompt. A prefix here is a small decode.Slots whose rows have drawn their first token,
and inserting it copies rows; a step is a segment of one token. Every row has its own key, since the orchestrator passes none.
Left out: prefixes that continue others, chunked prefill, samplers, adapters, and free_resource, which the orchestrator calls
after it may have filled the slot again: a row that nobody reads goes on to its limit.
"""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax import assemble, assemble_state, config as configuration
from arrol_jax.engine import kv_cache, programs
from arrol_jax.engine.programs import Slots
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine
from arrol_jax.models import sharding
from arrol_jax.types import UserError

FLAGS = {"port": ("9000", "to listen at"), "samples": ("1", "rows a prompt")}

try:
  from jetstream.core import config_lib, server_lib
  from jetstream.engine import engine_api, token_utils, tokenizer_api, tokenizer_pb2
except ImportError:
  if __name__ == "__main__":
    if {"--help", "-help", "-h"} & set(sys.argv[1:]):
      configuration.parse(sys.argv, FLAGS, __doc__)  # which prints it and ends
    print("error: JetStream is not installed; experiments/results/serve/README.md says how", file=sys.stderr)
    sys.exit(2)
  raise


class RolloutEngine(engine_api.Engine):
  """engine: loaded, its max_prompt one of JetStream's lengths (16, 32, ... 32768); samples G divides its rows.

  Raises UserError where these do not hold.
  """

  def __init__(self, engine: Engine, sampling: Sampling, tokenizer, path: str, samples: int = 1, seed: int = 0):
    if engine.max_prompt not in token_utils.DEFAULT_PREFILL_BUCKETS:
      raise UserError(f"rollout.max_prompt is {engine.max_prompt}; JetStream needs a power of two from 16 to 32768")
    if engine.rows % samples:
      raise UserError(f"{samples} samples a prompt do not divide {engine.rows} rows (rollout.slots)")
    self.engine, self.sampling, self.tokenizer, self.path, self.samples = engine, sampling, tokenizer, path, samples
    self.length = engine.lengths(sampling)[-1]
    self.seed, self.numbers = jax.random.key(seed), itertools.count()  # a number a prefill

  # ---- JetStream's programs

  def prefill(self, *, params, existing_prefix=None, padded_tokens, true_length, sampler=None, request_id=None):
    """Prompt i32[L] -> (Slots of G rows, their first tokens)."""
    return self._prefill(params, existing_prefix, padded_tokens, true_length, sampler, self.samples)

  def prefill_multisampling(self, *, params, existing_prefix=None, padded_tokens, true_length, sampler=None, rng=None,
                            num_samples=1):
    """The same with `num_samples` rows, each for a slot of its own (`bulk_insert`)."""
    if self.samples != 1:
      raise ValueError("multi-sampling takes a slot a sample: use --samples=1")
    return self._prefill(params, existing_prefix, padded_tokens, true_length, sampler, num_samples, rng)

  def _prefill(self, params, existing_prefix, padded_tokens, true_length, sampler, rows: int, rng=None):
    if existing_prefix is not None or sampler is not None:
      raise NotImplementedError("no existing prefixes and no samplers")
    c, tokens = self.engine.config, np.asarray(padded_tokens, np.int32)[None]
    # A longer prompt comes with its last tokens and its full length.
    length = np.array([min(true_length, tokens.shape[1])], np.int32)
    number = next(self.numbers) % (1 << 31)
    key = jax.random.fold_in(self.seed, number) if rng is None else rng
    with jax.set_mesh(self.engine.mesh):
      prefix = programs.prefill(c, params, tokens, length, sampling=self.sampling)
      room = min(self.length, -(-(tokens.shape[1] + 1) // kv_cache.BLOCK) * kv_cache.BLOCK)
      slots = programs.init_slots(c, rows, room, self.sampling)
      source, max_tokens, group = (np.full(rows, x, np.int32) for x in (0, self.engine.max_new, number))
      slots = programs.insert(slots, prefix, source, jax.random.split(key, rows), max_tokens, group)
      return self._step(params, slots, rows)

  def insert(self, prefix, decode_state, slot, request_id=None):
    return self._put(prefix, decode_state, np.arange(slot * self.samples, (slot + 1) * self.samples))

  def bulk_insert(self, prefix, decode_state, slots):
    return self._put(prefix, decode_state, np.asarray(slots))

  def _put(self, prefix, decode_state, rows):
    with jax.set_mesh(self.engine.mesh):
      return _put_rows(decode_state, prefix, rows.astype(np.int32))

  def generate(self, params, decode_state, sampler=None):
    """One token for every row that is not done."""
    if sampler is not None:
      raise NotImplementedError("no samplers")
    with jax.set_mesh(self.engine.mesh):
      return self._step(params, decode_state, self.samples)

  def _step(self, params, slots: Slots, samples: int):
    slots, tokens, *_ = programs.generate_segment(self.engine.config, params, slots, steps=1, sampling=self.sampling)
    # A row that is done says so with its last token: JetStream hands that out and ends the sample.
    data = _columns(tokens, slots.active, slots.generated)
    return slots, engine_api.ResultTokens(data, (0, 1), (1, 2), (2, 3), samples)

  def init_decode_state(self, *args, **kwargs):
    with jax.set_mesh(self.engine.mesh):
      return programs.init_slots(self.engine.config, self.engine.rows, self.length, self.sampling)

  # ---- what JetStream asks about

  def load_params(self, *args, **kwargs):
    return self.engine.params

  def get_prefix_destination_sharding(self):
    return sharding.replicated(self.engine.mesh)

  def get_tokenizer(self):
    return tokenizer_pb2.TokenizerParameters(path=self.path, tokenizer_type=tokenizer_pb2.TokenizerType.huggingface)

  def build_tokenizer(self, metadata):
    return Tokenizer(self.tokenizer, self.sampling.stop_ids)

  max_concurrent_decodes = property(lambda self: self.engine.rows // self.samples)
  samples_per_slot = property(lambda self: self.samples)
  max_prefill_length = property(lambda self: self.engine.max_prompt)
  mesh = property(lambda self: self.engine.mesh)
  colocated_cpus = property(lambda self: None)
  use_chunked_prefill = property(lambda self: False)
  prefill_chunk_size = property(lambda self: self.engine.max_prompt)


class Tokenizer(tokenizer_api.Tokenizer):
  """The model's own tokenizer, which puts a BOS where the model wants one."""

  def __init__(self, tokenizer, stop_ids: tuple[int, ...]):
    self.tokenizer, self.stop_ids = tokenizer, stop_ids

  def encode(self, s, is_bos=True, prefill_lengths=None, max_prefill_length=None, jax_padding=True):
    tokens = np.array(self.tokenizer.encode(s), np.int32)
    return token_utils.pad_tokens(tokens, self.bos_id, self.pad_id, False, prefill_lengths, max_prefill_length, jax_padding)

  def decode(self, token_ids, **kwargs):
    return self.tokenizer.decode(token_ids, skip_special_tokens=True)

  eos_id = property(lambda self: self.stop_ids[0])
  bos_id = property(lambda self: self.eos_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id)
  pad_id = property(lambda self: self.eos_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id)
  stop_tokens = property(lambda self: {*self.stop_ids, self.pad_id})


@functools.partial(jax.jit, donate_argnames=("slots",))
def _put_rows(slots: Slots, new: Slots, rows: jax.Array) -> Slots:
  """Copies all rows of `new` to `rows` i32[R] of `slots`, whose cache has at least as many columns."""
  write = lambda old, x: old.at[:, rows, :x.shape[2]].set(x)
  cache = tuple(kv_cache.pin(jax.tree.map(write, *pair)) for pair in zip(slots.cache, new.cache, strict=True))
  rest = jax.tree.map(lambda old, x: old.at[rows].set(x), slots.replace(cache=()), new.replace(cache=()))
  return rest.replace(cache=cache)


@jax.jit
def _columns(tokens: jax.Array, valid: jax.Array, lengths: jax.Array) -> jax.Array:
  """What JetStream's ResultTokens hold, i32[B,3]."""
  return jnp.concatenate([tokens, valid.astype(jnp.int32)[:, None], lengths[:, None]], axis=1)


def main():
  c, flags = configuration.parse(sys.argv, FLAGS, __doc__)
  if __debug__:
    raise UserError("JetStream's orchestrator asserts what a race makes false: run python -O -m arrol_jax.jetstream")
  configuration.check(c)
  for name in ("port", "samples"):
    if not flags[name].value.isdigit() or not int(flags[name].value):
      raise UserError(f"--{name} is {flags[name].value!r}; it must be an integer of at least 1")
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh):
    loaded = assemble.load(c, mesh)
    if flags["workdir"].present:
      assemble_state.from_checkpoint(c, loaded, mesh, flags.workdir)
    engine = assemble.eval_engine(c, loaded, mesh, loaded.params)
  adapter = RolloutEngine(engine, assemble.sampling(c, loaded, c.rollout.temperature), loaded.tokenizer, c.model.path,
                          int(flags.samples), c.seed)
  devices = server_lib.get_devices()
  slices = config_lib.ServerConfig(interleaved_slices=(f"{devices[0].platform}={len(devices)}",),
                                   interleaved_engine_create_fns=(lambda devices: adapter,))
  server = server_lib.run(port=int(flags.port), config=slices, devices=devices, jax_padding=False)
  print(f"serving {c.model.path} to JetStream clients on port {flags.port}", flush=True)
  server.wait_for_termination()


if __name__ == "__main__":
  configuration.run(main)
