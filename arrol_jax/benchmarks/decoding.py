"""W1: the engine alone, tokens a second against what reading weights and cache allows.
"""

import statistics
import time

import jax
import numpy as np

from arrol_jax.benchmarks.measuring import alike, ceilings, decode_floor, make_engine, requests, spread, target_lengths, timed
from arrol_jax.models import transformer


def decode(a, c, mesh) -> list[dict]:
  """W1: static and useful tokens a second of the engine, log-probs and hidden states on."""
  limits = ceilings()
  engine, sampling = make_engine(a, c, mesh, a.slots or a.rows)
  engine.load(jax.jit(lambda key: transformer.init_params(c, key, a.dtype))(jax.random.key(0)), a.dtype)
  key, start = jax.random.key(1), time.perf_counter()
  engine.warm_up(sampling)
  compile_s = time.perf_counter() - start
  lengths = target_lengths("lognormal", a.rows, a.max_new, 0.4, 0.6)
  everything = np.full(a.rows, a.max_new)
  own, full = alike(a, lengths), alike(a, everything)

  def run(work) -> list[float]:
    wanted = requests(c, a.group, work)
    return timed(lambda: engine.run(wanted, key, sampling) and None, a.runs)[0]

  useful = run(own)
  out = {"tok_s_useful": int(lengths.sum()) / statistics.median(useful),
         "useful_floor_share": decode_floor(c, a, own, engine.rows, limits) / statistics.median(useful),
         "useful_floor_share_shared": decode_floor(c, a, own, engine.rows, limits, shared=True) / statistics.median(useful),
         "floor": limits}
  rates = [int(lengths.sum()) / s for s in useful]
  if a.static:
    static = run(full)
    floor, shared = (decode_floor(c, a, full, engine.rows, limits, shared=x) for x in (False, True))
    rates, seconds = [a.rows * a.max_new / s for s in static], statistics.median(static)
    out |= {"tok_s_static": a.rows * a.max_new / seconds, "floor_share": floor / seconds, "floor_share_shared": shared / seconds,
            "floor": limits | {"tok_s_static": a.rows * a.max_new / floor, "tok_s_static_shared": a.rows * a.max_new / shared}}
  if a.profile:
    short = requests(c, a.group, alike(a, np.full(a.rows, 2 * a.segment)))
    with jax.profiler.trace(a.profile):
      engine.run(short, key, sampling)
  return [out | {"compile_s": compile_s, "cache": a.cache or a.dtype, "weights": a.weights or a.dtype} | spread(rates)]
