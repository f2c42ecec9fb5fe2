"""What a config asks for that does nothing, or lacks something beside it: no reason to refuse it."""

from ml_collections import ConfigDict

from arrol_jax import assemble, config as configuration
from arrol_jax.pruning import features


def of(c: ConfigDict) -> list[str]:
  """A line each."""
  out, usual = [], configuration.defaults().model.lora
  unused = [f"model.lora.{name}" for name in ("alpha", "targets") if c.model.lora[name] != usual[name]]
  if unused and not c.model.lora.rank:
    out.append(f"{', '.join(unused)}: nothing comes of it without model.lora.rank, and all weights are trained")
  named = [f"loss.{name}" for name in ("clip_low", "clip_high") if c.loss[name] is not None]
  named += ["GSPO's ratio"] * (c.loss.name == "gspo" or c.loss.ratio == "sequence")
  if named and c.optim.epochs * c.optim.minibatches == 1:
    out.append(f"{', '.join(named)}: nothing comes of it with one optimizer step a batch, where the ratio is 1; set optim.epochs "
               "or optim.minibatches")
  if c.optim.warmup > c.steps:
    out.append(f"optim.warmup is {c.optim.warmup} and steps is {c.steps}: the run ends before the learning rate is reached")
  if c.rollout.ahead and c.loss.correction == "none":
    out.append("rollout.ahead: tokens drawn before the last update are learned from as if the policy had drawn them; "
               "loss.correction=truncate weighs them")
  depth = lambda inputs: features.plan(inputs, 1000).prompt
  read = assemble.linear_inputs(c)
  if assemble.candidates(c) > c.rollout.prompts and depth(read) not in (None, depth((f"prompt@{c.rollout.candidate_layer}",))):
    out.append(f"rollout.candidate_layer is {c.rollout.candidate_layer}: prompts are chosen by the state that quality.inputs "
               f"reads, {next(x for x in read if x.startswith('prompt@'))}")
  return out + of_evaluation(c)


def of_evaluation(c: ConfigDict) -> list[str]:
  """Those on an evaluation alone."""
  alike = c.eval.samples > 1 and c.eval.temperature == 0
  out = [f"eval.samples is {c.eval.samples} and eval.temperature 0: greedy responses to a problem are all alike, so votes and "
         "pass@k say nothing; set eval.temperature=1.0"] * alike
  out += ["data.thinking: prompts of data sets hear nothing of it without data.chat"] * (c.data.thinking and not c.data.chat)
  return out
