"""One page on a config before it runs: what would be read, rolled out, rewarded and held in memory, and what is wrong with it.

  arrol-doctor --config=quickstart
  arrol-doctor --config=my/run.py --workdir=DIR        # also what changed since DIR's checkpoint
  arrol-doctor --config=gsm8k_qwen3_06b --config.model.path=DIR --config.rollout.max_new=1024
The checks are arrol-train's own. Nothing is compiled, and of the weights only headers are read, unless --workdir holds a run
whose weights they must be. The reward function is called, on answers made up from the data. What cannot work is an error, and
the status is 2; what looks wrong is a warning. Left out: speed, and memory that activations take (arrol-plan: for TPUs, one GPU).
"""

from contextlib import ExitStack
import functools
import sys

import jax

from arrol_jax import assemble, assemble_state, config as configuration
from arrol_jax.preflight import folder, prompts, reward, settings, sizes
from arrol_jax.preflight.page import Page
from arrol_jax.running import hosts, loggers
from arrol_jax.running.workdir import stored_inputs
from arrol_jax.types import UserError


def main():
  c, flags = configuration.parse(sys.argv, doc=__doc__)
  hosts.check_devices()
  configuration.check(c, files=False)
  loggers.names(c.log.backends)
  page, workdir, defaults = Page(), flags.workdir, configuration.defaults()
  with ExitStack() as stack:
    page.section("config", lambda: settings.settings(page, c))
    begun = page.section("workdir", lambda: folder.settings(page, c, defaults, workdir))
    mesh = page.section("devices", lambda: devices(page, c))
    if mesh is not None:
      stack.enter_context(jax.set_mesh(mesh))
    whole = bool(begun) and stored_inputs(workdir) is not None and mesh is not None
    model = page.section("model", lambda: policy(page, c, mesh, whole))
    there = page.section("data", lambda: sources_are_there(c))
    page.section("export", lambda: assemble_state.check_export(c, workdir, model.tokenizer), model)
    train = page.section("problems", lambda: prompts.train_prompts(page, c, model), model, there)
    held_out = page.section("held out", lambda: prompts.held_out_prompts(page, c, model, train), model, train)
    page.section("prompt", lambda: prompts.one_prompt(page, model, train), train)
    page.section("stop tokens", lambda: prompts.tokenizer(page, c, model, train), train)
    page.section("context", lambda: prompts.context(page, c, model, train), train)
    grader = page.section("reward", lambda: stack.enter_context(assemble.grader(c)))
    page.section("reward", lambda: reward.reward(page, c, grader, train), grader, train)
    shapes = page.section("step", lambda: sizes.shapes(page, c, model, mesh), model, mesh)
    page.section("memory", lambda: sizes.memory(page, c, model, *shapes), shapes)
    if whole:
      begun_with = lambda: assemble.inputs(c, model, train, held_out)
      page.section("fingerprints", lambda: folder.fingerprints(page, workdir, begun_with()), train, held_out)
  for text in page.warnings:
    hosts.warn(text)
  for text in page.errors[:-1]:
    print("error:", text, file=sys.stderr)
  if page.errors:
    raise UserError(page.errors[-1])
  count = len(page.warnings)
  print("\nready to run" + (f", with {count} warning{'s' * (count > 1)}" if count else ""))


def devices(page: Page, c) -> jax.sharding.Mesh:
  """The mesh of the config over this machine's devices."""
  mesh = assemble.make_mesh(c)
  shape = " x ".join(f"{name} {count}" for name, count in mesh.shape.items())
  page.say(f"{mesh.size} of {jax.device_count()} ({jax.devices()[0].device_kind}): {shape}")
  return mesh


def sources_are_there(c) -> bool:
  configuration.check_data(c)
  return True


def policy(page: Page, c, mesh: jax.sharding.Mesh, whole: bool):
  """The model from its headers, or with its weights."""
  configuration.check_model(c)
  loaded = assemble.load(c, mesh, training=True) if whole else assemble.opened(c, training=True)
  m = loaded.config
  page.say(f"{m.family}, {m.layers} layers of width {m.width}, {m.heads} heads over {m.kv_heads} of keys and values, "
           f"{m.vocab:,} tokens")
  return loaded


command = functools.partial(configuration.run, main)

if __name__ == "__main__":
  command()
