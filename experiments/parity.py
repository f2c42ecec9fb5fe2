"""Compares a GGUF model here with transformers' own float32 loading of the same file, on real text.

  python -m experiments.parity --gguf=MODEL.gguf --data=gsm8k_test.jsonl,math500.jsonl --out=OUT.jsonl

Needs torch and accelerate besides what this package needs. Prints and writes JSON lines: a "weights" line (every tensor
against transformers'), a "logits" line for each text, a "tokenizer" line for each data file (ids against transformers'
conversion of the file's tokenizer, with the first texts that differ), and a "summary" line with the command.
A text is two problems with their answers, in this package's token ids; positions are compared one by one: largest
absolute difference of logits, share of positions whose most likely token is the same. The committed results are in
experiments/results/parity/. Left out: sampling, bfloat16, GPUs (float32 on the CPU).
"""

import argparse
import json
from pathlib import Path
import shlex
import sys

import jax
import numpy as np
import transformers

from arrol_jax import config
from arrol_jax.models.files import hf_config
from arrol_jax.models.files.weights import Policy, load_policy
from arrol_jax.types import UserError

try:
  import torch
except ModuleNotFoundError:
  torch = None

ROW = 128  # rows are padded to a multiple, so that few shapes are compiled


def problems(file: Path) -> list[dict]:
  with open(file) as f:  # line by line: str.splitlines would also split at Unicode line separators inside strings
    return [json.loads(line) for line in f if line.strip()]


def make_texts(rows: list[dict], count: int) -> list[str]:
  show = lambda row: f"Question: {row['problem']}\nAnswer: \\boxed{{{row['answer']}}}"
  return [show(a) + "\n\n" + show(b) for a, b in zip(rows[::2], rows[1::2], strict=False)][:count]


def compare_logits(ours: Policy, theirs, text: str) -> dict:
  ids = ours.tokenizer(text)["input_ids"]
  tokens = np.zeros((1, -(-len(ids) // ROW) * ROW), np.int32)
  tokens[0, :len(ids)] = ids
  a = np.asarray(ours.logits(tokens, np.array([len(ids)])))[0, :len(ids)]
  with torch.no_grad():
    b = theirs(torch.tensor([ids])).logits[0].float().numpy()
  return {"kind": "logits", "tokens": len(ids), "max_abs_diff": float(np.abs(a - b).max()),
          "mean_abs_diff": float(np.abs(a - b).mean()), "max_abs_logit": float(np.abs(b).max()),
          "top1_equal": int((a.argmax(-1) == b.argmax(-1)).sum())}


def compare_weights(ours: Policy, theirs) -> dict:
  """Largest absolute difference over all tensors, in transformers' layout."""
  state, worst = theirs.state_dict(), 0.0
  layout = hf_config.layout(ours.config)
  for name, place in layout.items():
    leaf = ours.params[place.leaf] if place.layer is None else ours.params["layers"][place.leaf][place.layer]
    back = [place.order.index(i) for i in range(len(place.order))]
    a = np.asarray(leaf).transpose(back).reshape(place.stored)
    worst = max(worst, float(np.abs(a - state[name].float().numpy()).max()))
  return {"kind": "weights", "tensors": len(layout), "max_abs_diff": worst}


def compare_tokenizers(ours, theirs, file: Path) -> dict:
  """Ids of every problem of `file` from both tokenizers, and the texts that ours does not give back."""
  texts = [row["problem"] for row in problems(file)]
  a, b = ours(texts, add_special_tokens=False)["input_ids"], theirs(texts, add_special_tokens=False)["input_ids"]
  differ = [i for i in range(len(texts)) if a[i] != b[i]]
  examples = []
  for i in differ[:3]:
    at = next((k for k, (x, y) in enumerate(zip(a[i], b[i], strict=False)) if x != y), min(len(a[i]), len(b[i])))
    examples.append({"ours": [ours.decode([t]) for t in a[i][at:at + 6]],
                     "transformers": [theirs.decode([t]) for t in b[i][at:at + 6]]})
  lost = sum(ours.decode(x) != t for x, t in zip(a, texts, strict=True))
  return {"kind": "tokenizer", "data": file.name, "texts": len(texts), "differ": len(differ), "examples": examples,
          "not_given_back": lost}


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--gguf", type=Path, required=True)
  parser.add_argument("--data", required=True, help="JSONL files, comma-separated; the first gives logits' texts")
  parser.add_argument("--texts", type=int, default=30)
  parser.add_argument("--out", type=Path)
  args = parser.parse_args(argv)
  files = [Path(f) for f in args.data.split(",")]
  for path in (args.gguf, *files):
    if not path.is_file():
      raise UserError(f"{path}: no such file")
  if torch is None:
    raise UserError("transformers' side of the comparison needs PyTorch: pip install torch")
  out = []

  def record(line: dict) -> None:
    print(json.dumps(line, ensure_ascii=False), flush=True)
    out.append(line)

  ours = load_policy(args.gguf)
  source = {"pretrained_model_name_or_path": args.gguf.parent, "gguf_file": args.gguf.name}
  theirs = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
  record(compare_weights(ours, theirs))
  lines = []
  for i, text in enumerate(make_texts(problems(files[0]), args.texts)):
    lines.append(compare_logits(ours, theirs, text) | {"text": i})
    record(lines[-1])
  del theirs
  tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
  for file in files:
    record(compare_tokenizers(ours.tokenizer, tokenizer, file))
  tokens = sum(x["tokens"] for x in lines)
  names = [f"--gguf={args.gguf.name}", f"--data={','.join(f.name for f in files)}", f"--texts={args.texts}"]
  record({"kind": "summary", "model": args.gguf.stem, "family": ours.config.family,
          "parameters": ours.config.num_params(), "texts": len(lines), "positions": tokens,
          "max_abs_diff": max(x["max_abs_diff"] for x in lines),
          "top1_share": sum(x["top1_equal"] for x in lines) / tokens,
          "chat_template_equal": ours.tokenizer.chat_template == tokenizer.chat_template,
          "device": jax.devices()[0].device_kind, "jax": jax.__version__,
          "transformers": transformers.__version__, "torch": torch.__version__,
          "command": shlex.join(["python", "-m", "experiments.parity", *names])})
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in out))


if __name__ == "__main__":
  config.run(lambda: main(sys.argv[1:]))
