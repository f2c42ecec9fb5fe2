"""Makes the arithmetic task that the repository ships: data and two tiny models, warmed up from scratch by supervision.

  python -m experiments.make_arithmetic            # about 4 minutes on 2 CPU cores; writes experiments/arithmetic/

A problem is a sum such as 3+5-2+7-1>; a response works it out, 3+5=8;8-2=6;6+7=13;13-1=12;A12. Two models come out:
  signs   half of its demonstrations read every minus as a plus. A sampled response picks a reading early and sticks to it,
          so success is written in the hidden state long before the end. It is built to be predictable: it shows the mechanism
          and proves nothing about real models.
  clean   correct demonstrations only, stopped early: errors fall at random places, so no head can foresee them. The
          counter-case.
"""

import argparse
import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from arrol_jax.learning import logprobs as policy_logprobs
from arrol_jax.models import transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.files.weights import Policy
from arrol_jax.models.zoo import ZOO

OUT = "experiments/arithmetic"
TERMS, ROWS, LENGTH = 5, 128, 64
CHARS = "0123456789+-=>;A"
PAD, BOS, EOS = len(CHARS), len(CHARS) + 1, len(CHARS) + 2


def problem(rng: np.random.Generator) -> str:
  digits = rng.integers(1, 10, TERMS)
  return str(digits[0]) + "".join(f"{rng.choice(['+', '-'])}{d}" for d in digits[1:])


def solve(text: str, minus: int = -1) -> tuple[str, int]:
  """The worked response and the answer; minus=1 misreads every minus as a plus."""
  total, steps = int(text[0]), []
  for op, digit in zip(text[1::2], text[2::2], strict=True):
    op = "+" if minus > 0 else op
    new = total + int(digit) * (1 if op == "+" else -1)
    steps.append(f"{total}{op}{digit}={new}")
    total = new
  return ";".join(steps) + f";A{total}", total


def tokenizer():
  """One token a character."""
  import tokenizers
  from transformers import PreTrainedTokenizerFast
  vocab = {x: i for i, x in enumerate([*CHARS, "<pad>", "<bos>", "<eos>"])}
  t = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
  t.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  t.decoder = tokenizers.decoders.Fuse()
  return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def write_problems(path: str, texts: list[str]) -> None:
  with open(path, "w") as f:
    for i, text in enumerate(texts):
      name = os.path.basename(path).partition(".")[0]
      record = {"id": f"{name}-{i}", "problem": text + ">", "answer": str(solve(text)[1]), "source": "arithmetic"}
      f.write(json.dumps(record) + "\n")


def demonstrations(rng: np.random.Generator, held_out: set, wrong: float) -> tuple[np.ndarray, np.ndarray]:
  """tokens i32[ROWS,LENGTH] and the mask of what is learnt (the response and its end), f32[ROWS,LENGTH]."""
  tokens, mask = np.full((ROWS, LENGTH), PAD, np.int32), np.zeros((ROWS, LENGTH), np.float32)
  for i in range(ROWS):
    text = problem(rng)
    while text in held_out:
      text = problem(rng)
    response = solve(text, 1 if rng.random() < wrong else -1)[0]
    row = [CHARS.index(x) for x in f"{text}>{response}"] + [EOS]
    tokens[i, :len(row)] = row
    mask[i, len(text) + 1:len(row)] = 1.0
  return tokens, mask


@functools.partial(jax.jit, static_argnames=("c", "optimizer"), donate_argnames=("params", "opt_state"))
def warm_up_step(c, params, opt_state, tokens, mask, optimizer):
  def loss(p):
    attend = causal_attention("xla")
    hidden = transformer.forward(c, p, tokens, transformer.default_positions(tokens), attend)[0]
    logprobs = policy_logprobs.token_logprobs(p, hidden, tokens, jnp.full(ROWS, LENGTH), 1.0, ROWS * LENGTH)[0]
    return -jnp.sum(logprobs * mask) / jnp.sum(mask)
  value, grads = jax.value_and_grad(loss)(params)
  updates, opt_state = optimizer.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, value


def warm_up(name: str, wrong: float, steps: int, held_out: set) -> None:
  c = dataclasses.replace(ZOO["tiny"], vocab=len(CHARS) + 3, max_length=64)
  rng, optimizer = np.random.default_rng(0), optax.adam(1e-3)
  params = transformer.init_params(c, jax.random.key(0))
  opt_state = optimizer.init(params)
  for _ in (bar := tqdm(range(steps), desc=f"warm-up {name}")):
    params, opt_state, value = warm_up_step(c, params, opt_state, *demonstrations(rng, held_out, wrong), optimizer)
    bar.set_postfix(loss=f"{float(value):.3f}")
  Policy(c, params, tokenizer(), eos_ids=(EOS,), pad_id=PAD).save(f"{OUT}/{name}", dtype="bfloat16")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("only", nargs="?", choices=["signs", "clean"], help="one of the two models")
  only = parser.parse_args().only
  os.makedirs(OUT, exist_ok=True)
  rng = np.random.default_rng(1)
  texts = list(dict.fromkeys(problem(rng) for _ in range(2600)))
  write_problems(f"{OUT}/train.jsonl", texts[:2000])
  write_problems(f"{OUT}/test.jsonl", texts[2000:2400])
  held_out = set(texts[2000:2400])
  if only != "clean":
    warm_up("signs", 0.5, 340, held_out)
  if only != "signs":
    warm_up("clean", 0.0, 200, held_out)


if __name__ == "__main__":
  main()
