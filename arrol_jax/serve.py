"""An OpenAI-compatible HTTP endpoint over the engine, with the head's votes; from a model, a checkpoint or an exported policy.

  arrol-serve --config=quickstart --port=8000                      # the config's model
  arrol-serve --config=quickstart --workdir=DIR --port=8000        # DIR's newest checkpoint of that run
  arrol-serve --config=quickstart --config.model.path=DIR/policy   # a run's exported policy and head
The config's data need not be there; flags take - and _ alike (docs/serving.md says more).
Paths: /v1/models, /v1/completions, /v1/chat/completions, /health, /ready, /metrics. openai_api.py says which fields are taken.
"""

import dataclasses
import functools
import os
from pathlib import Path
import socket
import sys

import jax
from ml_collections import ConfigDict

from arrol_jax import assemble, config as configuration
from arrol_jax.serving import prompts
from arrol_jax.serving.lifecycle import listen
from arrol_jax.serving.openai_api import Limits
from arrol_jax.serving.service import Judge, Service
from arrol_jax.serving.web import Access, make_app
from arrol_jax.types import UserError

PREFILL_ROWS = 4  # calls arrive one by one: a prefill of many rows would be mostly padding
CPU_SLOTS = 16    # where none are asked for: what a CPU decodes at once without each row being slow
FLAGS = {"host": ("127.0.0.1", "address to listen at"), "port": ("8000", "0: any free one"),
         "queue": ("256", "traces that may wait beyond rollout.slots; more: 429"),
         "drain": ("600", "seconds that calls under way get after SIGTERM or SIGINT; a second one cuts them off"),
         "name": ("", "what the model is called; its folder's name if not given"),
         "api_key": ("", "who calls must send it (or ARROL_API_KEY in the environment)"),
         "allowed_hosts": ("", "Host headers that are answered, separated by commas (on 127.0.0.1: its own)"),
         "cors": ("", "origins of web pages that may call, separated by commas"),
         "keep_alive": ("60", "seconds of an idle connection"), "still": ("60", "seconds without a step until /health says so"),
         "deterministic": ("false", "true: a text depends on nothing but its call, in bfloat16 too; costs speed")}
MOST = {"port": 65535, "queue": 10**6, "drain": 10**6, "keep_alive": 10**6, "still": 10**6}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def main():
  c, flags = configuration.parse(_underscored(sys.argv), FLAGS, __doc__)
  _check(c)
  number = {name: _number(name, flags[name].value, most) for name, most in MOST.items()}
  steady = _boolean("deterministic", flags.deterministic)
  access = _access(flags, number["still"])
  workdir = flags.workdir if flags["workdir"].present else None
  with _bind(flags.host, number["port"]) as listener:  # before a model is loaded for nothing
    service, limits = load(c, workdir, number["queue"], steady, flags.name)
    _tell(f"loaded {limits.model}: {service.engine.rows} slots, prompts of at most {limits.max_prompt} tokens")
    service.warm_up(_tell)
    status = listen(lambda started, broken: make_app(service, limits, started, broken, access), listener, number["drain"],
                    number["keep_alive"])
  if status:
    sys.exit(status)


def _tell(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _underscored(argv: list[str]) -> list[str]:
  """The command line with this command's flags spelt with _."""
  out = []
  for text in argv:
    name, equals, value = text.partition("=")
    known = name.startswith("--") and name[2:].replace("-", "_") in FLAGS
    out.append("--" + name[2:].replace("-", "_") + equals + value if known else text)
  return out


def _check(c: ConfigDict) -> None:
  """Serving needs the model and no data."""
  configuration.check(c, files=False)
  configuration.check_model(c)


def _number(name: str, text: str, most: int) -> int:
  if not text.isascii() or not text.isdigit() or int(text) > most:
    raise UserError(f"--{name} is {text!r}; it must be an integer from 0 to {most}")
  return int(text)


def _boolean(name: str, text: str) -> bool:
  if text.lower() not in ("true", "false"):
    raise UserError(f"--{name} is {text!r}; it must be true or false")
  return text.lower() == "true"


def _access(flags, still: int) -> Access:
  listed = lambda text: tuple(part.strip().lower() for part in text.split(",") if part.strip())
  hosts = listed(flags.allowed_hosts) or (LOOPBACK if flags.host in LOOPBACK else ("*",))
  key = flags.api_key or os.environ.get("ARROL_API_KEY") or None
  return Access(hosts, listed(flags.cors), key, still)


def _bind(host: str, port: int) -> socket.socket:
  """A socket that listens at host and port, so that no other server can; callers wait until the model is there."""
  out = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
  out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    out.bind((host, port))
    out.listen(2048)
  except OSError as e:
    out.close()
    raise UserError(f"cannot listen at {host}:{port}: {e.strerror or e}; give another --port or --host") from e
  return out


def load(c: ConfigDict, workdir: str | None, queue_size: int, steady: bool = False, name: str = "") -> tuple[Service, Limits]:
  """The engine's side of a server, of the config's model or of the newest checkpoint in `workdir`."""
  mesh = assemble.make_mesh(c)
  _fit(c, steady)
  with jax.set_mesh(mesh):
    loaded = assemble.load(c, mesh)
    if workdir:
      state, _ = assemble.from_checkpoint(c, loaded, mesh, workdir)
      loaded.params, loaded.head, loaded.calibration = state.policy, state.params["head"], state.calibration
      del state  # the optimizer's part is not needed
    assemble.follow_head(c, loaded)
    assemble.check_tables(c, loaded)
    assemble.warn(loaded, [])
    engine = dataclasses.replace(assemble.eval_engine(c, loaded, mesh, loaded.params), prefill_rows=PREFILL_ROWS)
    loaded.params = None
  how = dataclasses.replace(assemble.sampling(c, loaded), top_p=None, confidence=assemble.TOP_K,
                            pool=assemble.pools(c, loaded.head))
  judge = Judge(loaded.head, loaded.calibration, assemble.detect(c), assemble.linear_inputs(c))
  service = Service(engine, how, loaded.tokenizer, queue_size, judge, steady)
  limits = Limits(name or model_name(workdir or c.model.path), engine.max_prompt, engine.max_new, service.most,
                  loaded.config.vocab, loaded.tokenizer, c.reward.pattern, c.eval.window, loaded.head is not None,
                  loaded.calibration is not None, c.data.thinking, prompts.longest_token(loaded.tokenizer))
  return service, limits


def _fit(c: ConfigDict, steady: bool) -> None:
  """What a config for training leaves open."""
  if c.rollout.slots is None and jax.default_backend() == "cpu":
    c.rollout.slots = CPU_SLOTS
  if steady:  # one program for every company
    c.rollout.row_buckets = c.rollout.length_buckets = 1


def model_name(path: str) -> str:
  """A model's folder, or the run's of an exported policy; of a file its own name, unless that says nothing."""
  name = Path(path).resolve()
  if name.is_file():
    name = name.parent if name.stem == "model" else name.with_suffix("")
  return name.parent.name if name.name == "policy" else name.name


command = functools.partial(configuration.run, main)

if __name__ == "__main__":
  command()
