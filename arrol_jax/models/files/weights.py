"""Models in and out: `load_policy` reads a Hugging Face folder or a GGUF file, `Policy.save` writes such a folder.

Loading checks every file's header against the shapes that config.json asks for before anything is allocated. Then each
stacked parameter is allocated once, in its target sharding, and the tensors are written into it one after another, in
the order of the files, by a jitted update that reuses the buffer. Beyond the parameters the host holds a few tensors
(mapped from their file, or dequantised by threads) and one's copy on the way to the device. Saving goes the other way, tensor
by tensor.

The files beside this one: safetensors.py and gguf.py (formats), folders.py (which of a folder's files count),
hf_config.py (names, shapes, config.json), tokenizers.py, adapters.py. Left out: downloads, reading LoRA adapters, quantised or
float8 safetensors.
"""

import collections
from collections.abc import Iterator
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import os
from pathlib import Path
import shutil
import tempfile

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from arrol_jax.models import lora, sharding, transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.files import folders, gguf as gguf_files, hf_config, safetensors as safetensors_files, tokenizers
from arrol_jax.models.files.folders import HEAD, INDEX
from arrol_jax.models.files.safetensors import Stored
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.types import Calibration, UserError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
SHARD_BYTES = 5 * 10**9
_READERS = 4  # threads, and tensors that are read ahead


@dataclasses.dataclass
class Policy:
  """A model: shape, parameters, tokenizer and what ends its responses."""
  config: PolicyConfig
  params: dict                        # as transformer.init_params: layers stacked, adapters beside them where config.lora is set
  tokenizer: object | None            # transformers tokenizer, None where the source has none
  eos_ids: tuple[int, ...]            # any of them ends a response
  pad_id: int
  generation: dict | None = None      # generation_config.json
  head: dict | None = None            # quality head's parameters (pruning/head.py)
  calibration: Calibration | None = None
  head_inputs: tuple[str, ...] = ()   # what the head reads (quality.inputs), and
  detect: tuple[int, ...] = ()        # at which response lengths; () where a folder does not say
  stored: dict[str, Stored] | None = None  # the files' tensors, where params are shapes that `read` has yet to fill

  def read(self, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None, table: dict = sharding.TRAIN) -> None:
    """Reads the weights of a policy that `open_policy` gave; what there is to say is said at `load_policy`."""
    self.params, self.stored = _loaded(self.config, self.stored, _dtype(dtype), mesh, table), None

  def logits(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """tokens i32[B,S] (right-padded with anything), lengths i32[B] -> logits f32[B,S,V], 0.0 past a row's length.

    Raises ValueError: other shapes, numbers that are no integers, lengths outside 0..S, tokens outside the vocabulary.
    bfloat16 parameters are computed with in bfloat16, others in float32 with full float32 products on every backend.
    Compiled once a shape [B,S]. Holds all logits: for short texts and checks, not for training.
    """
    tokens, lengths = _checked(np.asarray(tokens), np.asarray(lengths), self.config.vocab)
    with jax.default_matmul_precision("highest"):
      return _logits(self.config, self.params, tokens, lengths)

  def save(self, path: str | os.PathLike, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a Hugging Face folder: configs, tokenizer files, weights (adapters merged) in files of at most `shard_bytes`.

    dtype: that of the weights in the files, None = as they are. Quality head and calibration table, where there are
    any, go into quality_head.safetensors, which transformers ignores and `load_policy` reads.
    The folder is written under another name beside `path` and renamed at the end, so a save that fails leaves an
    existing folder as it was. With several processes all must call; the first writes.
    Raises UserError: unknown dtype, a model without a Hugging Face layout, `path` holds other files.
    """
    target = Path(path).resolve()
    name = dtype or str(self.params["embed"].dtype)
    _dtype(name)
    folders.check_replaceable(target, self.tokenizer)
    bos = getattr(self.tokenizer, "bos_token_id", None)
    config = hf_config.config_to_json(self.config, name, self.eos_ids, self.pad_id, bos)
    if jax.process_index() != 0:
      for _, _, _, read in _outgoing(self.config, self.params, name):
        read()
      return
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
      folder.chmod(0o755)  # mkdtemp makes it private
      _write_json(folder / "config.json", config)
      _write_json(folder / "generation_config.json", self._generation(bos))
      if self.tokenizer is not None:
        self.tokenizer.save_pretrained(str(folder))
      save_weights(folder, list(_outgoing(self.config, self.params, name)), shard_bytes)
      _save_head(folder / HEAD, self)
      folders.swap(folder, target)
    finally:
      shutil.rmtree(folder, ignore_errors=True)

  def _generation(self, bos: int | None) -> dict:
    eos = list(self.eos_ids) if len(self.eos_ids) != 1 else self.eos_ids[0]
    return (self.generation or {"bos_token_id": bos}) | {"eos_token_id": eos or None, "pad_token_id": self.pad_id}


def _checked(tokens: np.ndarray, lengths: np.ndarray, vocab: int) -> tuple[np.ndarray, np.ndarray]:
  """The same as i32, with 0 past a row's length. Raises ValueError, see Policy.logits."""
  if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
    raise ValueError(f"tokens [B,S] and lengths [B] are needed, not {tokens.shape} and {lengths.shape}")
  if not all(np.issubdtype(x.dtype, np.integer) for x in (tokens, lengths)):
    raise ValueError(f"tokens and lengths must be integers, not {tokens.dtype} and {lengths.dtype}")
  if np.any((lengths < 0) | (lengths > tokens.shape[1])):
    raise ValueError(f"lengths must be from 0 to the {tokens.shape[1]} columns of tokens, not {lengths.min()} to {lengths.max()}")
  tokens = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)
  if np.any((tokens < 0) | (tokens >= vocab)):
    raise ValueError(f"tokens must be from 0 to {vocab - 1}, the model's vocabulary, not {tokens.min()} to {tokens.max()}")
  return tokens.astype(np.int32), lengths.astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(c: PolicyConfig, params: dict, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
  positions = transformer.default_positions(tokens)
  dtype = jnp.bfloat16 if params["embed"].dtype == jnp.bfloat16 else jnp.float32
  hidden, _ = transformer.forward(c, params, tokens, positions, causal_attention("auto"), dtype=dtype)
  return jnp.where((positions < lengths[:, None])[:, :, None], transformer.unembed(params, hidden), 0.0)


def load_policy(path: str | os.PathLike, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None,
                table: dict = sharding.TRAIN, longest: int = 0) -> Policy:
  """Loads a Hugging Face folder (safetensors, sharded or not), a GGUF file, or a finished run's workdir (its policy/).

  dtype: that of the parameters, whatever the files hold. mesh: parameters are sharded over it by `table`
  (sharding.py); None puts them on the default device. longest: tokens that a row will have, prompt and response.
  Raises UserError, one line that names the file and the tensor or key: missing path, no weights, unknown or unsupported
  architecture, truncated or corrupt file, missing, unexpected or misshapen tensor, fewer positions than `longest`.
  """
  _dtype(dtype)  # told before anything is read
  policy = open_policy(path, longest)
  policy.read(dtype, mesh, table)
  return policy


def _dtype(name: str):
  if name not in DTYPES:
    raise UserError(f"dtype {name!r} is not supported (supported: {', '.join(DTYPES)})")
  return DTYPES[name]


def open_policy(path: str | os.PathLike, longest: int = 0) -> Policy:
  """`load_policy` that reads headers and the tokenizer alone: params are shapes until `read`; only that they are finite is not
  checked."""
  given, path = os.fspath(path), Path(path)
  if not path.exists():
    raise UserError(f"{path}: no such model; give a Hugging Face folder or a GGUF file{folders.how_to_fetch(given)}")
  if (path / "policy" / "config.json").is_file():
    path = path / "policy"
  folders.check_is_model(path)
  if path.is_file():
    return _opened_gguf(path, longest)
  file = path / "config.json"
  raw = folders.read_json(file)
  config = hf_config.config_from_json(file, raw)
  where, stored = folders.open_folder(path)
  if config.tied and _unties(stored):
    config = dataclasses.replace(config, tied=False)
  check_positions(config, str(file), longest)
  _check(config, where, stored)
  tokenizer = tokenizers.load_tokenizer(path)
  generation = folders.read_json(path / "generation_config.json") if (path / "generation_config.json").is_file() else None
  quality = _load_head(path / HEAD)
  eos_ids = tokenizers.stop_ids(tokenizer, (generation or {}).get("eos_token_id"), raw.get("eos_token_id"))
  pads = (getattr(tokenizer, "pad_token_id", None), raw.get("pad_token_id"), *eos_ids, 0)
  pad = next(p for p in pads if p is not None)
  return Policy(config, transformer.abstract_params(config), tokenizer, eos_ids, pad, generation, *quality, stored)


def _opened_gguf(path: Path, longest: int) -> Policy:
  file = gguf_files.open_gguf(path)
  check_positions(file.config, str(path), longest)
  _check(file.config, path, file.tensors)
  tokenizer = tokenizers.gguf_tokenizer(path, file.meta)
  declared = [file.meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
  eos_ids = tokenizers.stop_ids(tokenizer, *declared)
  pads = (file.meta.get("tokenizer.ggml.padding_token_id"), *eos_ids, 0)
  pad = next(p for p in pads if p is not None)
  return Policy(file.config, transformer.abstract_params(file.config), tokenizer, eos_ids, pad, stored=file.tensors)


def _unties(stored: dict[str, Stored]) -> bool:
  """Whether the files hold an unembedding that is not the embedding, whatever config.json says: transformers unties then."""
  embed, unembed = (stored.get(f"{name}.weight") for name in ("model.embed_tokens", "lm_head"))
  if embed is None or unembed is None or embed.shape != unembed.shape:
    return False
  return embed.dtype != unembed.dtype or not np.array_equal(embed.read().view(np.uint8), unembed.read().view(np.uint8))


def check_positions(config: PolicyConfig, where: str, longest: int) -> None:
  """UserError where rows of `longest` tokens do not fit the positions that a model was made for."""
  if longest > config.max_length:
    raise UserError(f"{where}: the model has {config.max_length} positions, and prompt and response may take {longest} tokens "
                    "together: lower rollout.max_prompt, rollout.max_new or eval.max_new")


# ---- loading -------------------------------------------------------------------------------------------------


def _check(config: PolicyConfig, where: Path, stored: dict[str, Stored]) -> None:
  """UserError where a tensor is missing, misshapen or one that this model does not have."""
  if config.layers > len(stored):  # also keeps a damaged number from filling the memory with names
    raise UserError(f"{where}: {len(stored)} tensors cannot be those of {config.layers} layers")
  layout = hf_config.layout(config)
  for name, place in layout.items():
    if name not in stored:
      raise UserError(f"{where}: tensor {name} is missing")
    if stored[name].shape != place.stored:
      raise UserError(f"{stored[name].file}: tensor {name} has shape {list(stored[name].shape)}, "
                      f"the configuration asks for {list(place.stored)}")
    if not jnp.issubdtype(stored[name].dtype, jnp.floating):
      raise UserError(f"{stored[name].file}: tensor {name} holds {stored[name].dtype}, only floating point is read")
  for name in stored:
    # Old files carry rotary tables; value heads and the like lie outside "model." and are not ours to read.
    if name.startswith("model.") and name not in layout and not name.endswith("rotary_emb.inv_freq"):
      raise UserError(f"{stored[name].file}: tensor {name} is not part of a {config.family} model of "
                      f"{config.layers} layers")


def _loaded(config: PolicyConfig, stored: dict[str, Stored], dtype, mesh, table: dict) -> dict:
  """The parameters. UserError where a tensor holds what is no finite number."""
  params = _place(config, stored, dtype, mesh, table)
  whole = None if mesh is None else sharding.replicated(mesh)  # every process sees it
  fine = jax.device_get(jax.jit(_finite, out_shardings=whole)(params))
  for name, place in hf_config.layout(config).items():
    if not (fine[place.leaf] if place.layer is None else fine["layers"][place.leaf][place.layer]):
      raise UserError(f"{stored[name].file}: tensor {name} holds NaN or infinity"
                      f"{'' if dtype == jnp.float32 else f' as {jnp.dtype(dtype).name}'}; fetch the model again, or take another")
  return params


def _finite(params: dict) -> dict:
  """Whether all of a weight is finite: bool[layers] of the stacked ones, bool[] of the others."""
  whole = {name: jnp.isfinite(x).all() for name, x in params.items() if name != "layers"}
  return whole | {"layers": {name: jnp.isfinite(x).all(axis=tuple(range(1, x.ndim))) for name, x in params["layers"].items()}}


def _place(config: PolicyConfig, stored: dict[str, Stored], dtype, mesh, table: dict) -> dict:
  """Writes the tensors into freshly allocated parameters, one at a time, in the order of `stored`."""
  layout, logical = hf_config.layout(config), transformer.logical_axes(config)
  shapes = transformer.abstract_params(config, dtype)
  get = lambda tree, place: tree[place.leaf] if place.layer is None else tree["layers"][place.leaf]
  targets = None if mesh is None else sharding.shardings(logical, shapes, mesh, table)
  params = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), out_shardings=targets)()
  for name, read in _read_ahead({name: file for name, file in stored.items() if name in layout}):
    place = layout[name]
    view = read.reshape(place.view)
    if mesh is None:
      tensor = jax.device_put(view)
    else:
      axes = get(logical, place)[-view.ndim:]
      axes = tuple(axes[place.order.index(i)] for i in range(view.ndim))  # as the file orders them
      source = NamedSharding(mesh, sharding.spec(axes, view.shape, mesh, table))
      tensor = jax.make_array_from_callback(view.shape, source, lambda index, view=view: view[index])
    tree = params if place.layer is None else params["layers"]
    write = _writer(place.order, place.layer is not None, targets and get(targets, place))
    tree[place.leaf] = write(tree[place.leaf], tensor, place.layer or 0)
    del view, read, tensor
    jax.block_until_ready(tree[place.leaf])  # or copies of later tensors would pile up on the host
  return params


def _read_ahead(stored: dict[str, Stored]) -> Iterator[tuple[str, np.ndarray]]:
  """(name, array) of each tensor in order. The next few are read meanwhile, by threads: dequantising takes longest."""
  names, waiting = iter(stored), collections.deque()
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    start = lambda: waiting.extend((name, pool.submit(stored[name].read)) for name in itertools.islice(names, 1))
    for _ in range(_READERS):
      start()
    while waiting:
      name, future = waiting.popleft()
      array = future.result()
      del future
      start()
      yield name, array
      del array


@functools.cache
def _writer(order: tuple, stacked: bool, target):
  """A program (stack, tensor, layer) -> stack with the transposed, converted tensor in it, in the stack's buffer."""
  def write(stack, tensor, layer):
    value = jnp.transpose(tensor, order).astype(stack.dtype)
    if not stacked:
      return jax.lax.dynamic_update_slice(stack, value, (0,) * stack.ndim)
    return jax.lax.dynamic_update_slice(stack, value[None], (layer,) + (0,) * value.ndim)
  return jax.jit(write, donate_argnums=0, out_shardings=target)


# ---- saving --------------------------------------------------------------------------------------------------


def _outgoing(config: PolicyConfig, params: dict, dtype: str) -> Iterator[tuple]:
  """(name, shape, dtype, read) of every Hugging Face tensor; `read` brings it to the host."""
  for name, place in hf_config.layout(config).items():
    leaf = jnp.asarray(params[place.leaf] if place.layer is None else params["layers"][place.leaf])
    pair = [params["layers"][x] for x in lora.names(place.leaf) if x in params["layers"]]
    read = functools.partial(_read, leaf, place, dtype, pair, config.lora.scale if pair else None)
    yield name, place.stored, np.dtype(DTYPES[dtype]), read


def _read(leaf: jax.Array, place: hf_config.Place, dtype: str, pair: list, scale: float | None) -> np.ndarray:
  value = _reader(place.order, place.layer is not None, dtype, leaf.sharding, scale)(leaf, place.layer or 0, pair)
  return np.asarray(value).reshape(place.stored)


@functools.cache
def _reader(order: tuple, stacked: bool, dtype: str, source, scale: float | None):
  """A program (stack, layer, adapters' stacks or []) -> that layer's tensor in Hugging Face's order, with its adapters added in
  float32 and rounded once, whole on every device of the mesh."""
  inverse = tuple(order.index(i) for i in range(len(order)))

  def read(stack, layer, pair):
    at = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
    value = at(stack) if stacked else stack
    if pair:
      value = value.astype(jnp.float32) + scale * lora.product(*map(at, pair))
    return jnp.transpose(value, inverse).astype(DTYPES[dtype])
  whole = NamedSharding(source.mesh, PartitionSpec()) if isinstance(source, NamedSharding) else None
  return jax.jit(read, out_shardings=whole)


def save_weights(folder: Path, tensors: list[tuple], shard_bytes: int) -> None:
  """Writes (name, shape, dtype, read) tensors as model.safetensors, or as several files of at most `shard_bytes`."""
  shards, room = [[]], shard_bytes
  for tensor in tensors:
    size = math.prod(tensor[1]) * tensor[2].itemsize
    if size > room and shards[-1]:
      shards.append([])
      room = shard_bytes
    shards[-1].append(tensor)
    room -= size
  if len(shards) == 1:
    safetensors_files.write(folder / "model.safetensors", shards[0])
    return
  names = {}
  for i, shard in enumerate(shards, 1):
    file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
    safetensors_files.write(folder / file, shard)
    names |= {name: file for name, *_ in shard}
  total = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype, _ in tensors)
  _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": names})


def _write_json(file: Path, value: dict) -> None:
  file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _save_head(file: Path, policy: Policy) -> None:
  values = {f"head.{k}": v for k, v in (policy.head or {}).items()}
  if policy.calibration is not None:
    values |= {f"calibration.{f.name}": getattr(policy.calibration, f.name) for f in dataclasses.fields(policy.calibration)}
  if values:
    arrays = {name: np.asarray(x) for name, x in values.items()}
    about = {"inputs": json.dumps(policy.head_inputs), "detect": json.dumps(policy.detect)}
    safetensors_files.write(file, [(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()], about)


def _load_head(file: Path) -> tuple[dict | None, Calibration | None, tuple, tuple]:
  """The last four fields of a Policy."""
  if not file.is_file():
    return None, None, (), ()
  parts: dict[str, dict] = {"head": {}, "calibration": {}}
  for name, tensor in safetensors_files.read_header(file).items():
    part, _, leaf = name.partition(".")
    if part in parts:
      parts[part][leaf] = jnp.array(tensor.read())  # a copy: the file may be replaced later
  about = safetensors_files.read_metadata(file)
  try:
    inputs, detect = (tuple(json.loads(about.get(name, "[]"))) for name in ("inputs", "detect"))
    return parts["head"] or None, Calibration(**parts["calibration"]) if parts["calibration"] else None, inputs, detect
  except (TypeError, ValueError) as e:
    raise UserError(f"{file}: the calibration table is not readable ({e})") from e
