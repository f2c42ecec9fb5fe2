"""The rollout engine's host side: request pool, slots, segment boundaries, compaction.

Everything that costs device time happens in programs.py; between two segments the host learns which rows ended, hands their
slots to waiting requests, and when none waits gathers the living rows into the next smaller compiled row count. Where a kernel
reads each row's own length (decode_attention.py) the cache has its full length from the start and an idle row costs no reading;
elsewhere its columns come in a few compiled lengths and grow with the longest living row. Shapes therefore come from two short
lists (`row_counts`, `lengths`), and each pair is compiled once.

The engine knows no quality head: `decide` is whatever the caller wants done at a boundary.
"""

import collections
from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax.engine import decode_attention, kv_cache, programs
from arrol_jax.engine.programs import Slots
from arrol_jax.engine.sampling import Sampling, SamplingParams
from arrol_jax.models import sharding, transformer
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.running import kept
from arrol_jax.types import Rollout


class Request(NamedTuple):
  """One response wanted. `index` names it in the step (and seeds its tokens), `prompt` its group."""
  index: int
  prompt: int
  tokens: np.ndarray   # i32[L]
  max_tokens: int      # response tokens at most
  temperature: float = 1.0  # these four where Sampling.temperature is None, see sampling.SamplingParams
  top_p: float = 1.0
  keep: float = 0.0
  ignore_stop: bool = False
  judged: bool = False      # a server's: its decisions are asked for (serving/pace.py)


class Decision(NamedTuple):
  """What a boundary decided, device arrays by row; rows not `decided` carry no meaning in the others."""
  decided: jax.Array    # bool[B]
  keep: jax.Array       # bool[B]
  score: jax.Array      # f32[B]
  posterior: jax.Array  # f32[B]
  keep_probability: jax.Array  # f32[B]  with which the row was kept
  rule_probability: jax.Array  # f32[B]  the rule's; differs for held-out rows, which are always kept, and where a floor adds some
  holdout: jax.Array    # bool[B]  kept whatever the rule says
  final: jax.Array      # f32[B]   the score as of a last token
  features: tuple | None = None  # what was scored, f32[B,...] each, where it is wanted on the host


# Measured on an H200 (experiments/LOG.md): a step of 64 rows, half of them idle, takes as long as one of 32.
_FEWEST_ROWS = 64


@dataclasses.dataclass
class Engine:
  """`rows`: slots; `max_prompt`, `max_new`: tokens; `segment`: steps between two looks of the host."""
  config: PolicyConfig
  mesh: jax.sharding.Mesh
  rows: int
  max_prompt: int
  max_new: int
  segment: int
  row_buckets: int = 4        # rows, rows/2, rows/4, ...
  length_buckets: int = 4     # cache lengths, evenly spaced up to max_prompt + max_new (one where a kernel reads own lengths)
  prefill_rows: int = 16      # prompts a prefill program takes
  weights: str | None = None  # "int8": matrices to decode with (models/int8.py); None: in the dtype that load() is given
  params: dict | None = None  # set by load()
  watch: Callable | None = None  # called at each boundary; what it raises ends the run there

  def __post_init__(self):
    unit = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    self.rows = _up(self.rows, unit)
    self.prefill_rows = _up(self.prefill_rows, unit)

  def row_counts(self, sampling: Sampling) -> list[int]:
    """Compiled row counts, ascending; where idle rows read nothing, none so small that gathering into it never pays."""
    unit = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    counts = {_up(max(1, self.rows >> i), unit) for i in range(self.row_buckets)}
    return sorted(n for n in counts if n == self.rows or n >= _FEWEST_ROWS * unit or not self._own_lengths(sampling))

  def _own_lengths(self, sampling: Sampling) -> bool:
    """Whether a kernel reads each row's own length, and nothing of an idle row."""
    return decode_attention.resolve(sampling.attention, self.config.head_dim, sampling.cache_dtype) != "xla"

  def lengths(self, sampling: Sampling) -> list[int]:
    """Compiled cache lengths, ascending; the last holds any response."""
    room = self.max_prompt + self.max_new
    if self._own_lengths(sampling):
      return [_up(room, kv_cache.BLOCK)]
    return sorted({_up(room * (i + 1) // self.length_buckets, 16) for i in range(self.length_buckets)})

  def load(self, params: dict, dtype: str) -> None:
    """Takes the training parameters: cast (or quantised), unstacked and resharded for decoding in one program."""
    self.params = None  # those of before make room first
    self.params = self.loader(params, dtype)(params)

  def loader(self, params: dict, dtype: str):
    """The jitted program of `load` for arrays (or ShapeDtypeStruct) like `params`."""
    shapes = jax.eval_shape(lambda params: transformer.decoding_params(self.config, params, dtype, self.weights), params)
    out = sharding.shardings(transformer.decoding_axes(self.config, self.weights), shapes, self.mesh, sharding.DECODE)
    return _to_decode(self.config, jax.tree.structure(out), tuple(jax.tree.leaves(out)), dtype, self.weights)

  def prompt_states(self, prompts: list[np.ndarray], sampling: Sampling) -> np.ndarray:
    """The states that Sampling.taps.prompt names of so many prompts' last tokens, f32[P,D]; runs the prefill program alone."""
    out = []
    for start in range(0, len(prompts), self.prefill_rows):
      part = prompts[start:start + self.prefill_rows]
      state = programs.prefill(self.config, self.params, *self.prompt_rows(part), sampling=sampling).state
      out.append(jax.device_get(everywhere(self.mesh)(state))[:len(part)].astype(np.float32))
    return np.concatenate(out)

  def prompt_rows(self, prompts: list[np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """At most `prefill_rows` prompts as the prefill program takes them: i32[P,L], i32[P]."""
    tokens = np.zeros((self.prefill_rows, self.max_prompt), np.int32)
    length = np.ones(self.prefill_rows, np.int32)
    for i, x in enumerate(prompts):
      tokens[i, :len(x)], length[i] = x, len(x)
    return sharding.put((tokens, length), sharding.rows(self.mesh))

  def warm_up(self, sampling: Sampling, decide: Callable | None = None) -> None:
    """Compiles every program of a run: all shapes on idle slots, which decode nothing."""
    counts, prompt = self.row_counts(sampling), np.zeros(1, np.int32)
    for length in self.lengths(sampling):
      for rows in reversed(counts):
        state = Run(self, jax.random.key(0), sampling)
        state.add(Request(0, 0, prompt, 1))
        state.open_slots(rows, length)
        state.start_segment(decide)
        if decide:
          state.slots, _ = decide(state.slots, None)
        state.assign(list(state.waiting))
        if rows > counts[0]:
          state.take([], counts[counts.index(rows) - 1], length)
        jax.block_until_ready(state.slots)

  def run(self, requests: list[Request], key: jax.Array, sampling: Sampling, *, decide: Callable | None = None,
          on_done: Callable | None = None) -> list[Rollout]:
    """Generates every request; returns rollouts in the order of `requests`.

    key: the step's key; a request's own is fold_in(key, index), so its tokens do not depend on its slot or company.
    decide(slots, lengths) -> (slots, Decision), called after each segment, may end rows; lengths: how many tokens rows that have
    not ended may have (None: any). on_done(rollout) is called while the next segment runs.
    """
    state = Run(self, key, sampling)
    rollouts = [state.add(request).rollout for request in requests]

    def report():
      for rollout in state.take_finished():
        on_done and on_done(rollout)

    while state.advance(decide, report):
      pass
    report()
    return rollouts


@functools.lru_cache(maxsize=8)
def _to_decode(c: PolicyConfig, treedef, leaves: tuple, dtype: str, weights: str | None):
  out = jax.tree.unflatten(treedef, leaves)
  return kept.jit(lambda params: transformer.decoding_params(c, params, dtype, weights),
                  also=(c, treedef, leaves, dtype, weights), out_shardings=out)


@dataclasses.dataclass(eq=False)  # two of them are never the same one
class Sequence:
  """A request, waiting or in a slot, and what it has said so far, a piece a segment."""
  request: Request
  rollout: Rollout
  tokens: list = dataclasses.field(default_factory=list)
  logprobs: list = dataclasses.field(default_factory=list)
  confidences: list = dataclasses.field(default_factory=list)
  count: int = 0    # tokens said, as far as the host has seen
  started: int = 0  # steps started


class Run:
  """Which request sits in which slot. Between two calls of `advance` requests may be added and cancelled: `Engine.run` is a
  closed list of them, a server an open one.

  What holds between two calls of `advance`:
  - A request is in one place: in `waiting`, in one slot, or ended, its rollout in `finished` once; a cancelled one in none.
  - `slot_to_request` has an entry a row of `slots`; None is a row that the device has ended too. The device may have ended more
    than the host has seen: their slots are given to others only after `look`.
  - `in_flight` is the oldest segment first, each with who sat where when it began, so that tokens go to them wherever slots moved
    since. At most one is left in it: the device may be a segment ahead of what the host has seen. None where the host would only
    leave slots idle by it: while requests wait for them (those added later find one) and nothing runs beside the host.
  - Rows and columns are among `counts` and `lengths`, and the columns hold all that segments in flight can say.
  - `count` <= response tokens on the device <= `started`, for each request in a slot.
  """

  def __init__(self, engine: Engine, key: jax.Array, sampling: Sampling):
    self.e, self.key, self.sampling = engine, key, sampling
    self.waiting: collections.deque[Sequence] = collections.deque()
    self.counts, self.lengths = engine.row_counts(sampling), engine.lengths(sampling)
    self.slots: Slots | None = None
    self.slot_to_request: list[Sequence | None] = []    # by slot
    self.shards = engine.mesh.shape["data"] * engine.mesh.shape["fsdp"]  # that the slots are split over
    self.length = 0                    # cache columns
    self.prefixes: tuple[dict, programs.Prefix | None] = ({}, None)
    self.in_flight: collections.deque = collections.deque()  # segments under way: (who sat where, device arrays)
    self.finished: list[Rollout] = []

  def add(self, request: Request) -> Sequence:
    """Puts a request behind those that wait. Requests of one prompt number have the same tokens."""
    rollout = Rollout(request.index, request.prompt, request.tokens, np.zeros(0, np.int32), np.zeros(0, np.float32))
    self.waiting.append(Sequence(request, rollout))
    return self.waiting[-1]

  def cancel(self, gone: list[Sequence]) -> None:
    """Takes requests out, waiting or seated; they never count as finished."""
    keep = lambda sequences: [None if sequence in gone else sequence for sequence in sequences]
    self.waiting = collections.deque(sequence for sequence in self.waiting if sequence not in gone)
    rows = np.array([sequence in gone for sequence in self.slot_to_request])
    if rows.any():
      self.slots = programs.free_resource(self.slots, rows)
    self.slot_to_request = keep(self.slot_to_request)
    self.in_flight = collections.deque((keep(sequences), results) for sequences, results in self.in_flight)

  def advance(self, decide: Callable | None = None, meanwhile: Callable | None = None) -> bool:
    """Fills free slots, starts a segment, calls meanwhile() while the device works, books what was said. False: nothing to do."""
    started = self.refill_and_fit()
    if started:
      self.e.watch and self.e.watch()
      self.start_segment(decide)
      meanwhile and meanwhile()
      while len(self.in_flight) > (0 if self.waiting and not runs_ahead() else 1):
        self.look()
    return started

  def take_finished(self) -> list[Rollout]:
    """Rollouts that ended since the last call."""
    out, self.finished = self.finished, []
    return out

  def refill_and_fit(self) -> bool:
    """Puts waiting requests into free slots and brings the batch to the smallest shape that holds it. False: nobody is left."""
    if not self.waiting and all(x.started >= x.request.max_tokens for x in self.slot_to_request if x):
      while self.in_flight:  # in which all end
        self.look()
    live = [i for i, x in enumerate(self.slot_to_request) if x]
    wanted = min(len(live) + len(self.waiting), self.e.rows)
    if not wanted:
      self.in_flight.clear()  # segments that ran ahead of the last end
      return False
    new = [self.waiting.popleft() for _ in range(wanted - len(live))]
    crowd = max(collections.Counter(i * self.shards // len(self.slot_to_request) for i in live).values(), default=0)
    rows = next(n for n in self.counts if n >= max(wanted, crowd * self.shards))
    columns = max(len(x.request.tokens) + x.count for x in [self.slot_to_request[i] for i in live] + new)
    columns += self.e.segment * (1 + len(self.in_flight))
    length = next((n for n in self.lengths if n >= columns), self.lengths[-1])
    if self.slots is None:
      self.open_slots(rows, length)
    elif rows != len(self.slot_to_request) or length > self.length:
      self.take(live, rows, length)
    if new:
      self.assign(new)
    return True

  def open_slots(self, rows: int, length: int) -> None:
    """Begins with so many slots of so many columns, all of them free."""
    self.slots = programs.init_slots(self.e.config, rows, length, self.sampling)
    self.slot_to_request, self.length = [None] * rows, length

  def take(self, live: list[int], rows: int, length: int) -> None:
    """Gathers the slots `live` into `rows` rows of `length` columns, each within its shard of the mesh."""
    old, new = len(self.slot_to_request) // self.shards, rows // self.shards
    index, at, free = np.repeat(np.arange(self.shards, dtype=np.int32) * old, new), [None] * rows, list(range(0, rows, new))
    for i in live:
      to = free[i // old]
      free[i // old] += 1
      index[to], at[to] = i, self.slot_to_request[i]
    self.slots = programs.take_rows(self.slots, index, np.array([sequence is not None for sequence in at]), length=length)
    self.slot_to_request, self.length = at, length

  def assign(self, new: list[Sequence]) -> None:
    """Puts requests into free slots, prompts prefilled once each."""
    free = iter([i for i, x in enumerate(self.slot_to_request) if not x])
    while new:
      if new[0].request.prompt not in self.prefixes[0]:
        self._prefill(new)
      where, prefix = self.prefixes
      rows, batch = len(self.slot_to_request), []
      while new and new[0].request.prompt in where:
        batch.append((next(free), new.pop(0)))
      source, limit, index, group = np.full(rows, -1, np.int32), *(np.zeros(rows, np.int32) for _ in range(3))
      for slot, sequence in batch:
        request = sequence.request
        source[slot], limit[slot] = where[request.prompt], request.max_tokens
        index[slot], group[slot] = request.index, request.prompt
        self.slot_to_request[slot] = sequence
      self.slots = programs.insert(self.slots, prefix, source, fold_all(self.key, index), limit, group,
                                   self._sampling_params(batch))

  def _sampling_params(self, batch: list[tuple[int, Sequence]]) -> SamplingParams | None:
    """What the requests of `batch`, (slot, sequence), choose for themselves, by slot."""
    if self.slots.sampling_params is None:
      return None
    params = SamplingParams(*(np.zeros(len(self.slot_to_request), np.float32) for _ in range(4)))
    for slot, sequence in batch:
      for name, column in vars(params).items():
        column[slot] = getattr(sequence.request, name)
    return params

  def _prefill(self, new: list[Sequence]) -> None:
    """Prefills the next distinct prompts of the pool, as many as one program takes."""
    prompts = {}
    for sequence in [*new, *self.waiting]:
      prompts.setdefault(sequence.request.prompt, sequence.request.tokens)
      if len(prompts) == self.e.prefill_rows:
        break
    tokens, length = self.e.prompt_rows(list(prompts.values()))
    self.prefixes = ({}, None)  # before the next one is made
    prefix = programs.prefill(self.e.config, self.e.params, tokens, length, sampling=self.sampling)
    self.prefixes = ({p: i for i, p in enumerate(prompts)}, prefix)

  def start_segment(self, decide: Callable | None, steps: int | None = None, most: np.ndarray | None = None,
                    sampling: Sampling | None = None) -> None:
    """Starts the next segment and the decision after it, without waiting for either. steps: other than the engine's, a program
    each; most i32[]: so many of them. sampling: other than the run's, but with the same slots."""
    steps = steps or self.e.segment
    self.slots, *said = programs.generate_segment(
      self.e.config, self.e.params, self.slots, steps=steps, sampling=sampling or self.sampling, most=most)
    for sequence in self.slot_to_request:
      if sequence:
        sequence.started += steps if most is None else int(most)
    lengths = {sequence.started for sequence in self.slot_to_request if sequence}  # of the rows that have not ended
    self.slots, decision = decide(self.slots, lengths) if decide else (self.slots, None)
    # Copies: the slots' own buffers are donated to the next program before the host may have read them. Whole on every device,
    # so that each process sees the same and does the same next (hosts.py).
    results = (*said, self.slots.generated, self.slots.active, decision)
    self.in_flight.append((list(self.slot_to_request), everywhere(self.e.mesh)(results)))

  def look(self) -> None:
    """Waits for the oldest unseen segment, books its tokens and frees the slots of the rollouts that ended in it."""
    sequences, results = self.in_flight.popleft()
    tokens, logprobs, confidences, generated, active, decision = jax.device_get(results)
    generated, active = generated.tolist(), active.tolist()
    ended = set()
    for i, sequence in enumerate(sequences):
      if not sequence or generated[i] == sequence.count:  # empty, or ended in a segment seen before
        continue
      count = generated[i] - sequence.count
      sequence.tokens.append(tokens[i, :count])
      sequence.logprobs.append(logprobs[i, :count])
      sequence.confidences.append(confidences[i, :count])
      sequence.count, out = generated[i], sequence.rollout
      if decision is not None:
        out.final = float(decision.final[i])
      if decision is not None and decision.decided[i]:
        score, q, p = (float(x[i]) for x in (decision.score, decision.posterior, decision.keep_probability))
        out.pruned, out.keep_probability = not decision.keep[i], out.keep_probability * p
        out.scores, out.posteriors = (*out.scores, score), (*out.posteriors, q)
        out.keep_probabilities += (p,)
        if decision.features is not None:
          out.features += (_row(decision.features, i),)
        out.rule_probability *= float(decision.rule_probability[i])
        out.holdout = bool(decision.holdout[i])
      if not active[i]:
        if decision is not None and decision.features is not None:
          out.final_features = _row(decision.features, i)
        said = sequence.tokens, sequence.logprobs, sequence.confidences
        out.tokens, out.logprobs, out.confidences = map(np.concatenate, said)
        out.stopped = not (out.pruned or sequence.request.ignore_stop) and int(out.tokens[-1]) in self.sampling.stop_ids
        self.finished.append(out)
        ended.add(id(sequence))
    self.slot_to_request = [None if sequence and id(sequence) in ended else sequence for sequence in self.slot_to_request]


def runs_ahead() -> bool:
  """Whether a device decodes while the host books what came before: better than filling a slot a segment sooner."""
  return sharding.platform() != "cpu"


_row = lambda tree, i: jax.tree.map(lambda x: x[i], tree)


def _up(n: int, unit: int) -> int:
  return -(-n // unit) * unit


@functools.lru_cache(maxsize=8)
def everywhere(mesh: jax.sharding.Mesh):
  return kept.jit(lambda tree: jax.tree.map(jnp.copy, tree), also=(mesh,), out_shardings=sharding.replicated(mesh))


@jax.jit
def fold_all(key: jax.Array, index: jax.Array) -> jax.Array:
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
