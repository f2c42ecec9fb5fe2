"""Soaks a server: random calls, some cancelled, some malformed; then SIGTERM while calls are under way.

  python -m experiments.serve_soak [--config=configs/quickstart.py] [--calls=500] [--at_once=32] [--bad=0.05]
                                   [--dtype=bfloat16 --deterministic=true] [--out=experiments/results/serve/soak.jsonl]

Starts `python -m arrol_jax.serve` in a process of its own. First one caller alone hears every good call's texts (seeded, so that
they are known); then `at_once` callers make the same calls in another order among the bad ones: half of those leave in the
middle of their stream, half are malformed or hostile (long bodies, half characters, typed control) and have to get a 4xx.
Counted: answers lost, answers that differ from what the call
got alone, bad calls without a 4xx, the server's memory (resident, MiB) after each tenth, and traces that still run at the end.
The drain: `at_once` streams, SIGTERM after the first token of one, and how many ended properly.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
import http.client
import json
import os
from pathlib import Path
import platform
import random
import re
import signal
import subprocess
import sys
import time

MALFORMED = [b"\xff\xfe\x00", b"{", {"prompt": "1>", "max_tokens": -1}, {"max_tokens": 3}, {"prompt": "1+" * 500},
             {"prompt": "1>", "n": 0}, {"prompt": "1>", "max_tokens": 10**9}, {"prompt": "1>", "temperature": "hot"},
             {"prompt": [1, 10**9]}, {"prompt": "1>", "x": 1}, {"prompt": "1+" * 1_950_000}, {"prompt": "1>", "user": "\ud83d"},
             {"prompt": [1] * 1_000_000}, {"prompt": ["1>"] * 5000}, {"prompt": "1>", "repetition_penalty": 2}, b"[" * 10**6,
             {"prompt": "1>", "response_format": {"type": "json_object"}}, {"prompt": " " * 3_900_000}]


def good_calls(count: int, max_new: int) -> list[dict]:
  rng = random.Random(0)
  out = []
  for i in range(count):
    numbers = [str(rng.randint(1, 9)) for _ in range(rng.randint(2, 6))]
    prompt = "".join(n + rng.choice("+-") for n in numbers)[:-1] + ">"
    out.append({"prompt": prompt, "max_tokens": rng.randint(1, max_new), "seed": i, "n": rng.choice([1, 1, 1, 2, 4]),
                "temperature": rng.choice([0, 0.7, 1, 1.5]), "top_p": rng.choice([1, 1, 0.9]), "stream": rng.random() < 0.5})
  return out


def post(port: int, body, hang_up: bool = False):
  """(status, texts) of a call, texts None if it got none; hang_up: leaves after the first event."""
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
  try:
    connection.request("POST", "/v1/completions", body if isinstance(body, bytes) else json.dumps(body))
    answer = connection.getresponse()
    if hang_up:
      answer.readline()
      return answer.status, None
    raw = answer.read().decode()
    if answer.status != 200:
      return answer.status, None
    if "data: " not in raw[:6]:
      return 200, [choice["text"] for choice in json.loads(raw)["choices"]]
    return 200, texts_of(raw, body.get("n", 1))
  finally:
    connection.close()


def texts_of(raw: str, n: int) -> list[str] | None:
  """The texts of a stream; None where it broke off."""
  texts, finished = [""] * n, 0
  for line in raw.split("\n\n")[:-2]:
    choice = json.loads(line.removeprefix("data: "))["choices"][0]
    texts[choice["index"]] += choice["text"]
    finished += choice["finish_reason"] is not None
  return texts if finished == n and raw.endswith("data: [DONE]\n\n") else None


def resident(pid: int) -> float:
  return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def health(port: int) -> dict:
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
  connection.request("GET", "/health")
  out = json.loads(connection.getresponse().read())
  connection.close()
  return out


def soak(process, port: int, args) -> dict:
  rng = random.Random(1)
  bad = round(args.calls * args.bad)
  calls = good_calls(args.calls - bad, args.max_new)
  alone = [post(port, call)[1] for call in calls]
  jobs = [("good", i) for i in range(len(calls))] + [("leaves" if i % 2 else "malformed", i) for i in range(bad)]
  rng.shuffle(jobs)

  seconds_of = []

  def one(job):
    kind, i = job
    if kind == "good":
      begun = time.monotonic()
      status, texts = post(port, calls[i])
      while status == 429:
        time.sleep(0.1)
        status, texts = post(port, calls[i])
      seconds_of.append(time.monotonic() - begun)
      return "lost" if texts is None else "right" if texts == alone[i] else "another's"
    if kind == "leaves":
      post(port, calls[i] | {"stream": True, "n": 4, "max_tokens": args.max_new}, hang_up=True)
      return "left"
    return "refused" if 400 <= post(port, MALFORMED[i // 2 % len(MALFORMED)])[0] < 500 else "not refused"

  memory, outcomes, start = [resident(process.pid)], [], time.monotonic()
  with ThreadPoolExecutor(args.at_once) as pool:
    for i, outcome in enumerate(pool.map(one, jobs)):
      outcomes.append(outcome)
      if (i + 1) % max(1, len(jobs) // 10) == 0:
        memory.append(resident(process.pid))
  seconds = time.monotonic() - start
  time.sleep(1)
  return {"calls": len(jobs), "at_once": args.at_once, "seconds": round(seconds, 1),
          "median_s": round(sorted(seconds_of)[len(seconds_of) // 2], 3),
          "p99_s": round(sorted(seconds_of)[len(seconds_of) * 99 // 100], 3), "traces": sum(c["n"] for c in calls),
          **{name: outcomes.count(name) for name in ("right", "another's", "lost", "refused", "not refused", "left")},
          "alone_lost": alone.count(None), "memory_mib": [round(m) for m in memory],
          **{name: n for name, n in health(port).items() if name in ("running", "waiting")}}


def drain(process, port: int, args) -> dict:
  """SIGTERM once each of `at_once` callers has heard something."""
  body = {"prompt": "5+5-7-9+1>", "temperature": 0, "stream": True}
  connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=120) for _ in range(args.at_once)]
  for connection in connections:
    connection.request("POST", "/v1/completions", json.dumps(body))
  answers = [connection.getresponse() for connection in connections]
  heads = [answers[0].readline()]
  process.send_signal(signal.SIGTERM)
  heads += [answer.readline() for answer in answers[1:]]
  ended = [texts_of((head + answer.read()).decode(), 1) for head, answer in zip(heads, answers, strict=True)]
  return {"streams": len(ended), "ended": sum(e is not None for e in ended), "texts": len({tuple(e) for e in ended if e}),
          "status": process.wait(60)}


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--config", default="configs/quickstart.py")
  parser.add_argument("--calls", type=int, default=500)
  parser.add_argument("--at_once", type=int, default=32)
  parser.add_argument("--bad", type=float, default=0.05)
  parser.add_argument("--slots", type=int, default=32)
  parser.add_argument("--max_new", type=int, default=48)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--deterministic", default="false")
  parser.add_argument("--out", default="experiments/results/serve/soak.jsonl")
  args = parser.parse_args()
  command = [sys.executable, "-m", "arrol_jax.serve", f"--config={args.config}", f"--config.rollout.slots={args.slots}",
             f"--config.model.dtype={args.dtype}", f"--deterministic={args.deterministic}", "--port=0"]
  machine = {"device": f"{os.cpu_count()} CPU cores, Python {platform.python_version()}",
             "command": " ".join(["python -m experiments.serve_soak", *sys.argv[1:]])}
  out = Path(args.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, open(out, "w") as file:
    port = int(process.stdout.readline().rsplit(":", 1)[1])
    for case in (soak, drain):
      line = {"case": case.__name__} | case(process, port, args) | machine
      print(json.dumps(line), flush=True)
      file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
  main()
