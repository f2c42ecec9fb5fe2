"""What serving runs on the device, compiled before the first call comes, so that nothing is compiled behind it.

`listed` names the programs and what they are given, as shapes; they are compiled side by side (engine/compile_ahead.py). Then
each runs once on idle slots (`try_all`), one shape after another: what the list has left out is compiled there. Left out of
both: second passes (scoring.py), and ways between a cache's lengths where there are several.
"""

from collections.abc import Callable
import time

import jax
import numpy as np

from arrol_jax.engine import programs
from arrol_jax.engine.compile_ahead import CompilingAhead, Program
from arrol_jax.engine.sampling import SamplingParams
from arrol_jax.engine.scheduler import Request, Run, everywhere, fold_all
from arrol_jax.models import int8, sharding
from arrol_jax.pruning import decision
from arrol_jax.serving import pace
from arrol_jax.serving.pace import PacedRun


def warm_up(make: Callable[[], PacedRun], judging: tuple | None, tell: Callable[[str], None]) -> None:
  """Compiles all that serving needs, and says how far it is. make() gives a fresh run; judging: what `decision.decide` is given
  behind the slots, None without a head."""
  run = make()
  with CompilingAhead(listed(run, judging), run.e.mesh) as ahead:
    start = said = time.monotonic()

    def report(done: int) -> None:
      nonlocal said
      if time.monotonic() > said + 1 or done == ahead.count:
        said = time.monotonic()
        tell(f"compiling: {done} of {ahead.count} programs, {said - start:.0f} s")

    ahead.wait(report)
  try_all(make, judging)


def shapes(run: PacedRun) -> list[tuple[int, int]]:
  """Rows and columns that slots come in."""
  return [(rows, length) for length in run.lengths for rows in reversed(run.counts)]


def segments(run: PacedRun, rows: int, judged: bool) -> list[dict]:
  """How segments of so many slots are asked for; judged: those with a decision behind them."""
  small = rows <= next(n for n in run.counts if n >= min(pace.MANY, run.counts[-1]))
  sizes = run.sizes if small or (judged and run.detect) else run.sizes[-1:]
  return [run.told(steps) for steps in sizes] + [run.told(pace.SHORT, top_p=True)]


def listed(run: PacedRun, judging: tuple | None) -> list[Program]:
  """The programs, without those of a prefix cache."""
  e, by_row, out = run.e, sharding.rows(run.e.mesh), []
  texts = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32, sharding=by_row)
  for count in run.prompt_counts if not run.kept else ():
    for width in run.widths:
      out.append(Program(f"prompts {count}x{width}", pace.prefill, lambda _, count=count, width=width: (
        e.config, e.params, texts(count, width), texts(count)),
        {"rows": e.prefill_rows, "width": e.max_prompt, "sampling": run.sampling}))
  prompts = out[0].name if out else None
  for rows, length in shapes(run):
    out += _on_slots(run, judging, rows, length, prompts)
  return out


def _on_slots(run: PacedRun, judging: tuple | None, rows: int, length: int, prompts: str | None) -> list[Program]:
  """What runs on slots of one shape. prompts: whose result is put into them."""
  e, at, row, idle = run.e, f" at {rows}x{length}", np.zeros(rows, np.int32), np.zeros(rows, bool)
  one = lambda name, jitted, args, *needs, **static: Program(name + at, jitted, args, static, tuple(n + at for n in needs))
  slots = lambda out: out["slots" + at]
  listed = [one("slots", programs.init_slots, lambda out: (e.config, rows, length, run.sampling)),
            one("keys", fold_all, lambda out: (run.key, row)),
            one("free", programs.free_resource, lambda out: (slots(out), idle), "slots")]
  if prompts:
    own = SamplingParams(*np.zeros((4, rows), np.float32)) if run.sampling.temperature is None else None
    insert = one("insert", programs.insert, lambda out: (slots(out), out[prompts], row, out["keys" + at], row, row, own))
    listed.append(insert._replace(needs=(prompts, "slots" + at, "keys" + at)))
  if judging:
    listed.append(one("decide", decision.decide, lambda out: (slots(out), *judging), "slots"))
  every = [told for judged in (False, True) for told in segments(run, rows, judged)]
  for steps, told in {"any" if "most" in told else told["steps"]: told for told in every}.items():
    told = {"steps": e.segment, "sampling": run.sampling} | told
    most, steps = (told.pop("most"),) if "most" in told else (), f"segment of {steps}"
    listed.append(one(steps, programs.segment_program(int8.is_int8(e.params)), lambda out, most=most: (
      e.config, e.params, slots(out), *most), "slots", **told))
    listed += [one(f"results of {steps}{' judged' * judged}", everywhere(e.mesh), lambda out, steps=steps, judged=judged: (
      (*out[steps + at][1:], slots(out).generated, slots(out).active, out["decide" + at][1] if judged else None),),
      "slots", steps, *["decide"] * judged) for judged in {False, judging is not None}]
  for count in (n for n in run.counts if n != rows):
    to, index = f" to {count}", np.zeros(count, np.int32)
    listed += [one("gather" + to, programs.take_columns, lambda out, index=index: (slots(out).cache[0], index), "slots",
                   length=length),
               one("gather rest" + to, programs.take_rest, lambda out, index=index: (
                 slots(out).replace(cache=()), index, index > 0, length), "slots")]
  return listed


def try_all(make: Callable[[], PacedRun], judging: tuple | None) -> None:
  """Runs each program once, on idle slots."""
  run, decide = make(), judging and decision.decider(judging)
  for width in run.widths:
    for count in run.prompt_counts:
      jax.block_until_ready(run.prefill([np.zeros(width, np.int32)] * count, width))
  for rows, length in shapes(run):
    state = make()
    state.open_slots(rows, length)
    state.add(Request(0, 0, np.zeros(1, np.int32), 1))
    for made in {None, decide}:
      for told in segments(state, rows, made is not None):
        Run.start_segment(state, made, **told)
    state.assign(list(state.waiting))
    state.slots = programs.free_resource(state.slots, np.zeros(rows, bool))
    jax.block_until_ready(state.slots)
    for count in (n for n in run.counts if n != rows):  # calls come and go by dozens
      state = make()
      state.open_slots(rows, length)
      state.take([], count, length)
      jax.block_until_ready(state.slots)
