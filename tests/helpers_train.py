"""Small training runs: their settings, the command in this process, what a run wrote."""

import contextlib
import io
import json
from pathlib import Path
import sys
from types import SimpleNamespace
from unittest import mock

from arrol_jax import config, train

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = "--config=configs/quickstart.py"
STEPS = 5
# One compiled shape of everything; a KL term, so that the reference policy has to survive a resume too.
SMALL = {"rollout.temperature": 1.1, "rollout.prompts": 4, "rollout.group_size": 4, "rollout.slots": 16,
         "rollout.row_buckets": 1, "rollout.length_buckets": 1, "rollout.max_prompt": 16, "rollout.max_new": 48,
         "rollout.segment": 8, "prune.detect": "(16,)", "prune.cold_start": 2, "prune.half_life": 40.0,
         "quality.hidden": 32, "loss.kl_weight": 0.05, "optim.lr": 1e-3, "optim.head_lr": 3e-3, "optim.warmup": 2,
         "optim.micro_tokens": 1024, "optim.length_buckets": 1, "eval.problems": 4, "eval.temperature": 1.1,
         "checkpoint.every": 2, "log.backends": "jsonl", "steps": STEPS}

# CONTRACT: names that users' scripts rely on.
METRICS = """step reward reward_ipw rollouts_started rollouts_pruned rollouts_kept keep_ratio pos_ratio pos_var
  groups_mixed tokens_generated tokens_trained response_len truncated head_loss head_auc head_auc_within head_ece
  logprob_gap policy_loss kl entropy clip_frac grad_norm lr
  sec_generate sec_reward sec_logprob sec_update sec_step""".split()
SUMMARY = "steps seconds device config_hash eval_before eval_after tokens_generated tokens_trained final_reward".split()
# A run without evaluation, saved after steps 2 and 3.
FAST = {"steps": 3, "data__eval": "", "checkpoint__export": False}


def arguments(workdir, **overrides):
  """Command line of a small run; in `overrides` a double underscore stands for the dot."""
  keys = SMALL | {k.replace("__", "."): v for k, v in overrides.items()}
  return [QUICKSTART, f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in keys.items())]


def in_process(module, *argv):
  """`python -m MODULE ARGV`, in this process: exit status and what it wrote."""
  out, err, status = io.StringIO(), io.StringIO(), 0
  with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
      mock.patch.object(sys, "argv", [module.__name__, *map(str, argv)]):
    try:
      config.run(module.main)
    except SystemExit as e:
      status = e.code
  return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def command(*argv):
  return in_process(train, *argv)


def run(workdir, **overrides):
  result = command(*arguments(workdir, **overrides))
  assert result.status == 0, result.err
  return result


def read(path):
  """JSON as other programs read it: without NaN."""
  def refuse(name):
    raise AssertionError(f"{path} holds {name}")
  text = Path(path).read_text()
  if str(path).endswith(".jsonl"):
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
  return json.loads(text, parse_constant=refuse)


def timeless(lines):
  return [{k: v for k, v in line.items() if not k.startswith("sec_")} for line in lines]


def assert_refused(result, *words):
  assert result.status == 2
  lines = result.err.splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: "), result.err
  assert "Traceback" not in result.err
  for word in words:
    assert word in lines[0], lines[0]
