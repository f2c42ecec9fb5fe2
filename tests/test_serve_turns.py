"""In what order the engine's thread tells what a segment brought (serving/service.py), without an engine."""

import threading
from types import SimpleNamespace

from arrol_jax.serving.calls import Totals
from arrol_jax.serving.service import Service


def test_who_has_ended_is_told_before_all_others():
  """A caller sends its next call once it has the end of this one; the others' pieces can wait that long."""
  service, told = Service.__new__(Service), []
  rollouts = [SimpleNamespace(name=name) for name in "abcd"]
  traces = {id(r): SimpleNamespace(
    told=0.0, sequence=SimpleNamespace(rollout=r), ticket=SimpleNamespace(on_piece=told.append),
    read=lambda ended, due, r=r: SimpleNamespace(tokens=[1], finish="stop" if ended else None, name=r.name)) for r in rollouts}
  service.run = SimpleNamespace(take_finished=lambda: [rollouts[3], rollouts[1]], slot_to_request=[])
  service.traces, service.totals, service._since, service._lock, service._taken = traces, Totals(), {}, threading.Lock(), 4
  service.on_turn = lambda: told.append("turn")
  service._report()
  assert [x if x == "turn" else x.name for x in told] == ["b", "d", "turn", "a", "c", "turn"]
  assert [t.sequence.rollout.name for t in service.traces.values()] == ["a", "c"] and service._taken == 2
