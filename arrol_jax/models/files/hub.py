"""Models by their id on the Hugging Face hub: model.path=Qwen/Qwen3-0.6B means the folder in the hub's cache that holds them.

What is missing there is downloaded, with progress bars; with HF_HUB_OFFLINE=1 nothing is. huggingface_hub is imported only where
an id is met. Left out: revisions (the default branch is taken), GGUF files out of a repository, weights other than safetensors.
"""

from collections.abc import Callable
import os
import re

from arrol_jax.running import shipped
from arrol_jax.types import UserError

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # weights, configs, tokenizers, chat templates


def is_id(path: str) -> bool:
  """Whether `path` reads as OWNER/NAME rather than as a place on this machine."""
  name = r"[A-Za-z0-9][\w.-]*"
  return bool(re.fullmatch(f"{name}/{name}", path)) and not path.endswith(".gguf") and not os.path.isdir(path.partition("/")[0])


def here(path: str) -> str:
  """The place on this machine that model.path means, whether or not there is anything; an id as it is."""
  found = shipped.find(os.path.expanduser(path))
  return path if not os.path.exists(found) and is_id(path) else found


def local(path: str) -> str:
  """The folder or file of model.path; a model of the hub is downloaded first. Raises UserError where that fails."""
  path = here(path)
  return path if os.path.exists(path) or not is_id(path) else download(path)


def download(name: str, folder: str | None = None) -> str:
  """Brings the model `name` into the hub's cache, or into `folder`; returns where it is."""
  import huggingface_hub

  return reached(name, lambda: huggingface_hub.snapshot_download(
    name, allow_patterns=_FILES, ignore_patterns=["original/*", "onnx/*"], local_dir=folder))


def reached(name: str, get: Callable, kind: str = "model", copy: str | None = None):
  """get(), with its failures as one line. copy: the command for a machine with access, and what to do with its result."""
  from huggingface_hub import errors

  copy = copy or f"arrol-get {name} --dir=DIR on one that can, then --config.model.path=DIR"
  unreachable = f"{name} is not on this machine, and the hub cannot be reached from it: {copy}"
  try:
    return get()
  except errors.GatedRepoError:
    raise UserError(f"{name} asks for its licence to be accepted: do so on its page of the hub, then `hf auth login`") from None
  except errors.RepositoryNotFoundError:
    raise UserError(f"{name}: neither here nor a public {kind} of the hub; for a private one `hf auth login`") from None
  except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
    raise UserError(unreachable) from None
  except (errors.HfHubHTTPError, OSError) as e:
    if isinstance(e, OSError) and e.errno is not None:  # the disk's
      raise
    raise UserError(f"{name}: the hub did not give it ({' '.join(str(e).split())[:200]})") from e
  except Exception as e:  # its HTTP client's own kinds, which change with its version
    if not type(e).__module__.startswith(("http", "requests", "urllib3")):
      raise
    raise UserError(unreachable) from None
