"""Scaling over devices: what the plan predicts for a mesh, and the plot of measured lines."""

import json

import numpy as np
import pytest

from arrol_jax.models.zoo import ZOO
from arrol_jax.planning import by_hand, rollout, work
from arrol_jax.planning.chips import Rates
from arrol_jax.planning.compiling import Program
from arrol_jax.types import UserError
from experiments import scaling_plot

C = ZOO["tiny"]
RATES = Rates(flops=1e9, memory=1e9, cache=1e9, link=1e6, layer=0.0, hop=0.0, rollout=0.01)


def predicted(devices, rows, moved=0):
  """A step of `rows` rollouts of 32 tokens on so many devices; each update's micro-batch moves `moved` bytes."""
  how = rollout.Decoding(8, 4, [rows], 16)
  w = by_hand.Workload(np.full(rows, 32), how, "float32", None, None, False, 512)
  names = "reshard", "prefill", "insert", "decode segment", "update", "optimizer"
  programs = {name: Program(name, 0, runs=1) for name in names}
  programs["update"].collectives = {"all-gather": [1, moved]}
  programs["decode segment"].collectives = {"all-reduce": [16, 16 * 10 * rows / devices]}
  return by_hand.predict(C, w, {"data": 1, "fsdp": 1, "tensor": 1} | {"fsdp": devices}, RATES, programs)


def test_without_links_weak_scaling_costs_what_does_not_shrink():
  """Each device decodes as many rows and trains as many tokens; the optimizer and the load are split, the host is one."""
  one, four = predicted(1, 16), predicted(4, 64)
  trained = work.packed(8, 16, np.full(64, 32), 512)
  assert four.seconds["update"] == pytest.approx(work.update_seconds(C, trained, RATES) / 4)
  assert four.seconds["rest"] == 4 * one.seconds["rest"] == 0.64
  linked = 32 * 2 * 10 * 16 / 1e6  # 32 steps, all-reduces of 10 bytes a row sent twice
  loads = work.load_seconds(C, RATES)
  assert four.seconds["generate"] - one.seconds["generate"] == pytest.approx(loads / 4 - loads, abs=1e-6)
  assert predicted(1, 16).seconds["generate"] > linked


def test_collectives_cost_time_and_are_counted():
  free, moved = predicted(4, 64), predicted(4, 64, moved=500_000)
  batches = work.packed(8, 16, np.full(64, 32), 512).tokens / (512 * 4)
  assert moved.seconds["update"] - free.seconds["update"] == pytest.approx(max(1, batches) * 0.5)
  assert moved.moved - free.moved == pytest.approx(max(1, batches) * 500_000)
  assert free.moved == pytest.approx(2 * 16 * 10 * 16)  # two segments


def test_int8_weights_read_a_quarter_of_float32_ones():
  wide, narrow = (work.decode_cost(C, "float32", None, weights=w) for w in (None, "int8"))
  assert narrow.weights == wide.weights / 4 and narrow.row_flops == wide.row_flops
  made, fast = rollout.simulate(np.full(4, 32), rollout.Decoding(8, 4, [4], 16)), RATES._replace(flops=1e15)
  saved = 32 * (wide.weights - narrow.weights) / fast.memory
  assert wide.seconds(made, fast) - narrow.seconds(made, fast) == pytest.approx(saved)


def lines(path, cases):
  """A file of `scale` lines from (devices, scaling, rows, seconds, predicted seconds)."""
  prediction = lambda said: {"chip": "h100", "sec_step": said, "sec_step_pruned": said / 2} if said else None
  out = [{"case": "scale", "shape": "tiny", "device": "cpu", "devices": n, "scaling": kind, "rows": rows, "sec_step": sec,
          "sec_step_pruned": sec / 2, "prediction": prediction(said)} for n, kind, rows, sec, said in cases]
  path.write_text("\n".join(map(json.dumps, out)))
  return str(path)


def test_speeds_are_rollouts_a_second_over_one_devices(tmp_path, monkeypatch, capsys):
  path = lines(tmp_path / "scale.jsonl", [(1, "weak", 8, 2.0, 1.0), (4, "weak", 32, 2.5, 1.0), (2, "strong", 8, 1.25, 0.5),
                                          (2, "weak", 16, 2.0, None)])
  read = scaling_plot.read(path)
  assert scaling_plot.speeds(read, "weak", lambda x: x["sec_step"]) == ([1, 2, 4], [1.0, 2.0, pytest.approx(3.2)])
  assert scaling_plot.speeds(read, "strong", lambda x: x["sec_step"]) == ([1, 2], [1.0, 1.6])
  said = lambda x: (x["prediction"] or {}).get("sec_step")
  assert scaling_plot.speeds(read, "weak", said) == ([1, 4], [1.0, 4.0])
  monkeypatch.setattr("sys.argv", ["scaling_plot", path])
  scaling_plot.main()
  assert capsys.readouterr().out == f"{tmp_path}/scale.png\n" and (tmp_path / "scale.png").stat().st_size > 10_000


def test_files_without_one_device_are_refused(tmp_path):
  path = lines(tmp_path / "scale.jsonl", [(2, "weak", 8, 2.0, None)])
  for wrong in (path, str(tmp_path / "none"), str(tmp_path)):
    with pytest.raises(UserError, match=wrong):
      scaling_plot.read(wrong)
