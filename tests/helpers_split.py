"""A server whose engine is none, with its HTTP side in processes of its own."""

import contextlib
import socket
import tempfile
import threading
import time
from types import SimpleNamespace

import numpy as np

from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Sequence
from arrol_jax.models import sharding
from arrol_jax.models.files.weights import load_policy
from arrol_jax.serving.front import Front
from arrol_jax.serving.openai_api import Limits
from arrol_jax.serving.service import Service
from arrol_jax.serving.web import Access
from arrol_jax.types import Rollout

ROWS, QUEUE, SAID = 4, 2, [3, 4]
TOKENIZER = load_policy("experiments/arithmetic/signs").tokenizer


class Says:
  """A PacedRun without a model: every row says the tokens SAID each turn. `trouble` may break it."""
  spare = 0.0

  def __init__(self, on_seat):
    self.on_seat, self.waiting, self.slot_to_request, self.finished, self.trouble = on_seat, [], [None] * ROWS, [], None

  def add(self, request):
    self.waiting.append(Sequence(request, Rollout(request.index, request.prompt, request.tokens, None, None)))
    return self.waiting[-1]

  def cancel(self, gone):
    self.waiting = [x for x in self.waiting if x not in gone]
    self.slot_to_request = [None if x in gone else x for x in self.slot_to_request]

  def take_finished(self):
    out, self.finished = self.finished, []
    return out

  def advance(self, decide, meanwhile):
    for i, x in enumerate(self.slot_to_request):
      if x is None and self.waiting:
        self.slot_to_request[i] = self.waiting.pop(0)
        self.on_seat(self.slot_to_request[i])
    meanwhile and meanwhile()
    time.sleep(0.005)
    if self.trouble == "breaks":
      raise OSError("the device is gone")
    for i, x in enumerate(self.slot_to_request):
      if x:
        x.tokens.append(np.array(SAID))
        x.logprobs.append(np.array([-0.5, -0.25]))
        x.count += 2
        if x.count >= x.request.max_tokens:
          x.rollout.features = (lambda: "cannot be pickled",) if self.trouble == "cannot be told" else ()
          self.finished.append(x.rollout)
          self.slot_to_request[i] = None
    return any(self.slot_to_request)


class Quick(Service):
  def _make_run(self):
    return Says(self._seated)


@contextlib.contextmanager
def split(said=None, count=1):
  """A server whose HTTP side has processes of its own: port, service, front, and `ended()`, which waits for run's status. said:
  where it prints."""
  engine = SimpleNamespace(rows=ROWS, max_prompt=16, max_new=10**6, mesh=sharding.make_mesh())
  service = Quick(engine, Sampling(None, (), "float32"), TOKENIZER, QUEUE)
  limits = Limits("mine", 16, 10**6, service.most, 19, TOKENIZER, None, 8, False, False)
  listener, status = socket.create_server(("127.0.0.1", 0)), []
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections have that too: little is on the way
  port = listener.getsockname()[1]
  with said or tempfile.TemporaryFile("w+") as said, Front(listener, count, said) as front:
    thread = threading.Thread(target=lambda: status.append(front.run(service, limits, Access(), 10.0, 5)))
    thread.start()

    def ended():
      thread.join(20)
      assert not thread.is_alive() and None not in [side.process.returncode for side in front.sides]
      said.seek(0)
      return status[0], said.read().splitlines()[1:]

    try:
      yield SimpleNamespace(port=port, service=service, front=front, ended=ended)
    finally:
      for side in front.sides:
        side.process.kill()
      thread.join(20)
