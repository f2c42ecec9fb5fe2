"""The engine's run at a server's pace: the first token soon, little padding.

A rollout step wants throughput: long segments, prompts prefilled many at a time at full width. A server has one caller at times:
- while few rows live a segment is two steps, so that tokens go out as they come (`PacedRun.steps`);
- with more rows the segment after the one that runs is started when half of that is over (`spare`): who ended with the one before
  has been told by then, and the call that comes in return is in it, not in the one after;
- with many rows a trace's text goes out less often than every segment (`gap`): it costs the host by the piece;
- a prompt, or what is new of it (prefixes.py), is prefilled at the smallest of a few widths that holds it, alone where it is so.
Segments end where a decision of the quality head is due that was asked for (`Request.judged`): all others' rows pass their
detection lengths, and while nobody asks no decision is made. Left out: what a call is (service.py), and what a segment does
(engine/programs.py).
"""

import collections
from collections.abc import Callable
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax.engine import programs
from arrol_jax.engine.programs import Prefix
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine, Run, Sequence
from arrol_jax.models import sharding
from arrol_jax.serving.prefixes import PrefixCache

FEW, SHORT = 4, 2     # so many living rows have segments of so many steps
SOME, MIDDLE = 16, 8  # and so many, of these; also a few more while someone waits for the first token
MANY = 32             # beyond so many what the host does with each piece counts more
PIECES = 1200         # a second of all traces together, about, where more than SOME live
LONGEST = 0.2         # seconds between two pieces of a trace, about, however many live


class PacedRun(Run):
  """detect: response lengths at which judged rows are decided, multiples of the engine's segment; on_seat(Sequence) is called
  when a request gets its slot. steady: prompts always go alone and segments always through one program, so that neither depends
  on what else is being served. kept: prefixes of earlier prompts."""

  def __init__(self, engine: Engine, sampling: Sampling, detect: tuple[int, ...] = (), on_seat: Callable | None = None,
               steady: bool = False, kept: PrefixCache | None = None):
    super().__init__(engine, jax.random.key(0), sampling)
    self.detect, self.on_seat, self.steady, self.kept = detect, on_seat, steady, kept
    self.flying: collections.deque[int] = collections.deque()  # steps of the segments under way
    self.began, self.step_seconds = 0.0, 0.0  # when the device began the oldest of them, and what a step takes
    # Kept prefixes are of whole blocks: block by block there is no telling what was kept.
    self.widths = [kept.block] if kept and steady else widths(engine.max_prompt)

  # ---- segments

  def steps(self, live: list[Sequence]) -> int:
    """Steps of the next segment."""
    fresh = any(not sequence.started for sequence in live)
    most = SHORT if len(live) <= FEW else MIDDLE if len(live) <= (MANY if fresh else SOME) else self.e.segment
    due = [length - sequence.started for sequence in live if sequence.request.judged for length in self.detect]
    most = min([self.e.segment, most, *(n for n in due if n > 0)])
    return max((n for n in self.sizes if n <= most), default=most)

  def start_segment(self, decide: Callable | None) -> None:
    live = [sequence for sequence in self.slot_to_request if sequence]
    steps = self.steps(live)
    if not self.in_flight:
      self.flying.clear()
      self.began = time.monotonic()
    self.flying.append(steps)
    judged = any(sequence.request.judged for sequence in live)
    super().start_segment(decide if judged else None, **self.told(steps, any(sequence.request.top_p < 1 for sequence in live)))

  def look(self) -> None:
    super().look()
    now = time.monotonic()
    took = (now - self.began) / self.flying.popleft()
    self.step_seconds, self.began = min(took, 1.1 * self.step_seconds or took), now  # a compilation's seconds are not believed

  @property
  def spare(self) -> float:
    """Seconds until the next segment should be started; none where few live, whose segments are over soon."""
    if not self.in_flight or len(self.slot_to_request) - self.slot_to_request.count(None) <= SOME:
      return 0.0
    return self.began + self.flying[0] * self.step_seconds / 2 - time.monotonic()

  @property
  def sizes(self) -> list[int]:
    """Steps that segments have, but for those that end before a decision which comes sooner."""
    return sorted({min(n, self.e.segment) for n in (SHORT, MIDDLE, self.e.segment)})

  def told(self, steps: int, top_p: bool = False) -> dict:
    """How a segment of so many steps is asked for. On a GPU, where the host has to wait for a loop of unknown length and for a
    branch (programs.asks_nobody), by a program of its own without either, unless a row wants top_p, which has both; elsewhere one
    program takes any number of steps."""
    if not programs.asks_nobody() or self.steady or top_p or steps not in self.sizes:
      return {"most": np.int32(steps)}
    return {"steps": steps, "sampling": dataclasses.replace(self.sampling, top_p=self.sampling.top_p or 1.0)}

  # ---- prompts

  def assign(self, new: list[Sequence]) -> None:
    for sequence in new:
      self.on_seat and self.on_seat(sequence)
    super().assign(sorted(new, key=lambda sequence: self.width(sequence)))  # stable: a prompt's traces stay together

  def width(self, sequence: Sequence) -> int:
    tokens = sequence.request.tokens
    return next((n for n in self.widths if n >= (self.kept.missing(tokens) if self.kept else len(tokens))), self.widths[-1])

  def _prefill(self, new: list[Sequence]) -> None:
    """Prefills the next prompt, and those after it that have the same width."""
    width, prompts = self.width(new[0]), {}
    for sequence in [*new, *self.waiting]:
      if self.width(sequence) != width or (len(prompts) == self.most_prompts and sequence.request.prompt not in prompts):
        break
      prompts[sequence.request.prompt] = sequence.request.tokens
    self.prefixes = ({}, None)  # before the next one is made
    prefix = self.prefill(list(prompts.values()), width)
    self.prefixes = ({p: i for i, p in enumerate(prompts)}, prefix)

  @property
  def most_prompts(self) -> int:
    return 1 if self.steady else self.e.prefill_rows

  @property
  def prompt_counts(self) -> list[int]:
    """Prompts that prefill programs take, ascending; a row a shard of the mesh at least."""
    counts = {max(n, self.shards) for n in (1, FEW, self.e.prefill_rows)}
    return sorted(n for n in counts if n <= max(self.most_prompts, self.shards) and n % self.shards == 0)

  def prefill(self, prompts: list[np.ndarray], width: int) -> Prefix:
    """Prompts of at most `width` tokens that are not kept; the result has always the same shape."""
    rows = next(n for n in self.prompt_counts if n >= len(prompts))
    if self.kept:
      return self.kept.prefill(self.e, self.sampling, prompts, rows, width)
    tokens, length = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
    for i, prompt in enumerate(prompts):
      tokens[i, :len(prompt)], length[i] = prompt, len(prompt)
    tokens, length = sharding.put((tokens, length), sharding.rows(self.e.mesh))
    return prefill(self.e.config, self.e.params, tokens, length, rows=self.e.prefill_rows, width=self.e.max_prompt,
                   sampling=self.sampling)


def gap(live: int) -> float:
  """Seconds for which what a trace says is kept back after a piece of it, unless it ends, while so many live."""
  return 0.0 if live <= SOME else min(LONGEST, live / PIECES)


def widths(max_prompt: int) -> list[int]:
  """Tokens that prompts are padded to, ascending: an eighth, a quarter, a half and all of the most."""
  return sorted({min(max_prompt, -(-max_prompt // 2**i // 16) * 16) for i in range(4)})


@functools.partial(jax.jit, static_argnames=("c", "rows", "width", "sampling"))
def prefill(c, params: dict, tokens: jax.Array, length: jax.Array, *, rows: int, width: int, sampling: Sampling) -> Prefix:
  """programs.prefill, its result padded to `rows` prompts of `width` columns: what takes it in is compiled once."""
  out = programs.prefill(c, params, tokens, length, sampling=sampling)
  missing, columns = rows - tokens.shape[0], width - tokens.shape[1]
  pad = lambda x: jnp.pad(x, [(0, 0), (0, missing), (0, columns)] + [(0, 0)] * (x.ndim - 3))
  more = lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
  return Prefix(jax.tree.map(pad, out.cache), more(out.last_token), more(out.length), more(out.state))
