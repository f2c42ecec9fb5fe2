"""An OpenAI-compatible HTTP endpoint over the engine, with the head's votes; from a model, a checkpoint or an exported policy.

  arrol-serve --config=quickstart --port=8000                      # the config's model
  arrol-serve --workdir=DIR --name=mine --port=8000                # a run's newest checkpoint, by its own config
  arrol-serve --config=quickstart --config.model.path=DIR/policy   # a run's exported policy and head
The config's data need not be there; flags take - and _ alike (docs/serving.md says more).
Paths: /v1/models, /v1/completions, /v1/chat/completions, /health, /ready, /metrics. openai_api.py says which fields are taken.
"""

from collections.abc import Callable
import contextlib
import ipaddress
import os
import re
import signal
import socket
import sys

from ml_collections import ConfigDict

from arrol_jax import config as configuration
from arrol_jax.assemble_service import load
from arrol_jax.engine import compile_ahead
from arrol_jax.models.files import tokenizers
from arrol_jax.running import hosts
from arrol_jax.serving.front import Front, processes_here
from arrol_jax.serving.lifecycle import BACKLOG
from arrol_jax.serving.web import Access
from arrol_jax.types import UserError

FLAGS = {"host": ("127.0.0.1", "address to listen at"), "port": ("8000", "0: any free one"),
         "queue": ("256", "traces that may wait beyond rollout.slots; more: 429"),
         "drain": ("600", "seconds that calls under way get after SIGTERM or SIGINT; a second one cuts them off"),
         "name": ("", "what the model is called; its folder's name if not given"),
         "api_key": (None, "who calls must send it (or ARROL_API_KEY in the environment)"),
         "allowed_hosts": ("", "Host headers that are answered, separated by commas (on 127.0.0.1: its own)"),
         "cors": ("", "origins of web pages that may call, separated by commas"),
         "http_processes": ("0", "that speak HTTP; 0: one for four cores, four at most"),
         "keep_alive": ("60", "seconds of an idle connection"), "still": ("60", "seconds without a step until /health says so"),
         "prefix_cache": ("0", "MiB for what prompts begin with, kept between calls; 0: off"),
         "deterministic": ("false", "true: a text depends on nothing but its call, in bfloat16 too; costs speed")}
MOST = {"port": 65535, "queue": 10**6, "drain": 10**6, "keep_alive": 10**6, "still": 10**6, "prefix_cache": 10**6,
        "http_processes": 64}
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+")
_HOST = re.compile(r"[^\s/:\[\]]+")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def main():
  c, flags = configuration.parse(_underscored(sys.argv), FLAGS, __doc__)
  _check(c)
  tokenizers.import_early()
  if not flags.host:
    raise UserError("--host is empty; give an address: 127.0.0.1 for this machine alone, 0.0.0.0 for all of its addresses")
  if not flags.name.isprintable():
    raise UserError(f"--name is {flags.name!r}; a model's name is text that can be printed")
  number = {name: configuration.whole_number(name, flags[name].value, 0, most) for name, most in MOST.items()}
  steady = _boolean("deterministic", flags.deterministic)
  access = _access(flags, number["still"])
  workdir = flags.workdir if flags["workdir"].present else None
  listener = _bind(flags.host, number["port"])  # before a model is loaded for nothing
  with Front(listener, number["http_processes"] or processes_here()) as front, _on_signal(_give_up):
    service, limits = load(c, workdir, number["queue"], steady, flags.name, number["prefix_cache"])
    _tell(f"loaded {limits.model}: {service.engine.rows} slots, prompts of at most {limits.max_prompt} tokens")
    service.warm_up(_tell)
    with _on_signal(lambda *_: front.stop()):
      status = front.run(service, limits, access, number["drain"], number["keep_alive"])
  if status:
    sys.exit(status)


@contextlib.contextmanager
def _on_signal(handler: Callable):
  before = {name: signal.signal(name, handler) for name in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield
  finally:
    for name, handler in before.items():
      signal.signal(name, handler)


def _give_up(number: int, _frame) -> None:
  """A signal before anything is served: nobody is waiting for an answer."""
  with contextlib.suppress(OSError):  # print is not to be called in the middle of another print
    os.write(2, f"{signal.Signals(number).name} while loading: nothing was served\n".encode())
  sys.exit(128 + number)


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
  configuration.check(c, files=False, training=False)
  configuration.check_model(c)


def _boolean(name: str, text: str) -> bool:
  if text.lower() not in ("true", "false"):
    raise UserError(f"--{name} is {text!r}; it must be true or false")
  return text.lower() == "true"


def _is_address(host: str) -> bool:
  try:
    ipaddress.ip_address(host)
  except ValueError:
    return False
  return True


def _is_loopback(host: str) -> bool:
  return ipaddress.ip_address(host).is_loopback if _is_address(host) else host in LOOPBACK


def _access(flags, still: int) -> Access:
  listed = lambda text: tuple(part.strip().lower() for part in text.split(",") if part.strip())
  for name in listed(flags.allowed_hosts):
    if not (name == "*" or _HOST.fullmatch(name) or _is_address(name)):
      raise UserError(f"--allowed_hosts has {name!r}; it takes names and addresses, without a scheme or a port")
  hosts = listed(flags.allowed_hosts) or ((*LOOPBACK, flags.host) if _is_loopback(flags.host) else ("*",))
  origins = listed(flags.cors)
  for origin in origins:
    if not _ORIGIN.fullmatch(origin):
      raise UserError(f"--cors has {origin!r}; an origin is SCHEME://HOST or SCHEME://HOST:PORT, as in https://chat.example")
  return Access(hosts, origins, _key(flags.api_key), still)


def _key(given: str | None) -> str | None:
  """The key of --api_key, or else of the environment; None: none is wanted."""
  where, key = ("--api_key", given) if given is not None else ("ARROL_API_KEY", os.environ.get("ARROL_API_KEY"))
  if key is None:
    return None
  key = key.strip()
  if not key or re.search(r"[\x00-\x1f\x7f]", key):
    raise UserError(f"{where} {'has a control character' if key else 'is empty'}; give a key, or leave it out for none")
  return key


def _bind(host: str, port: int) -> socket.socket:
  """A socket that listens at host and port, so that no other server can; callers wait until the model is there."""
  out = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
  out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    out.bind((host, port))
    out.listen(BACKLOG)
  except OSError as e:
    out.close()
    raise UserError(f"cannot listen at {host}:{port}: {e.strerror or e}; give another --port or --host") from e
  return out


def command() -> None:
  """The whole process. One that ends before its programs are compiled does not wait for those that nobody will call."""
  hosts.process(lambda: configuration.run(main), compile_ahead.compiling)


if __name__ == "__main__":
  command()
