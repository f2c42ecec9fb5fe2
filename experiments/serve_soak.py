"""Soaks a server: thousands of calls among hostile ones, then SIGTERM while calls are under way.

  python -m experiments.serve_soak --calls=5000 --together=64 --hostile=0.05 --minutes=20 --out=FILE
                                   [--config=quickstart --config.model.path=... --config.model.dtype=bfloat16]
                                   [--opening=32 --prefix_cache=8 --config.rollout.max_prompt=48
                                    --max_new=16 --config.rollout.max_new=16 --config.prune.detect=8
                                    --config.rollout.segment=8]

Starts `python -m arrol_jax.serve` in a process of its own; what is not a flag of this command goes to it, and so does
--deterministic=true unless told otherwise. One caller alone first hears the texts of so many different calls (--distinct). Then
`together` callers make them again and again in random order, until --calls or --minutes are over, among hostile ones (`HOSTILE`:
each kind has the answers that are right) and clients that leave. With --opening half of the prompts begin with as many
characters, the same ones, for --prefix_cache to keep.

One JSON line: calls with the very text that the call got alone, another's, lost; hostile calls by kind that got a wrong answer;
the times of small calls; resident memory; what was left running. Then `together` streams and SIGTERM: who ended, who was cut, how
long it took, what the server said. "failed" lists what is wrong, and the status is 1 if anything is.
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
import socket
import subprocess
import sys
import tempfile
import threading
import time

from experiments.serve_load import post, quantile, streamed

SUM, CHAT = "1+2-3>", "/v1/chat/completions"
BAD, FINE = range(400, 500), range(200, 201)
# kind -> (bodies, statuses that are right); the numbers are of cases that once went wrong
HOSTILE = {
  "long prompts": ([{"prompt": "1+" * 1_950_000}, {"prompt": " " * 3_900_000}, {"prompt": [1] * 1_000_000},
                    {"prompt": [SUM] * 5000}, {"messages": [{"role": "user", "content": "1" * 3_900_000}], "path": CHAT}], BAD),
  "no JSON": ([b"\xff\xfe\x00", b"{", b"[" * 10**6, b"", b"null", b"9" * 5000, b'{"prompt": "1>", "n": 1e999}'], BAD),
  "half characters": ([{"prompt": SUM, "user": "\ud83d"}, {"prompt": SUM, "\ud83d": 1}, {"prompt": "1\ud800>"},
                       {"messages": [{"role": "\ud83d", "content": "1"}], "path": CHAT}], BAD),
  "wrong values": ([{"prompt": SUM, "max_tokens": -1}, {"max_tokens": 3}, {"prompt": SUM, "n": 0},
                    {"prompt": SUM, "max_tokens": 10**9}, {"prompt": SUM, "temperature": "hot"},
                    {"prompt": [1, 10**9]}, {"prompt": SUM, "x": 1},
                    {"prompt": SUM, "repetition_penalty": 2}, {"prompt": SUM, "response_format": {"type": "json_object"}}], BAD),
  "roles and parts": ([{"messages": [{"role": role, "content": "1"}], "path": CHAT} for role in ("banana", "tool", 3)] + [
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "path": CHAT}], BAD),
  "load testers": ([{"prompt": SUM, "max_tokens": 4, "repetition_penalty": 1.0, "ignore_eos": False, "top_k": -1, "min_p": 0,
                     "reasoning_effort": None, "logprobs": None, "stream": True,
                     "stream_options": {"include_usage": True, "continuous_usage_stats": True}}], FINE),
  "votes with a stop string": ([{"prompt": SUM, "n": 8, "vote": "majority", "stop": [";"], "temperature": 2.0, "max_tokens": 8},
                                {"prompt": SUM, "n": 16, "vote": "deepconf", "temperature": 2.0, "max_tokens": 8}], FINE),
  "second passes": ([{"prompt": SUM, "max_tokens": 0, "echo": True, "logprobs": 5},
                     {"prompt": SUM, "max_tokens": 4, "logprobs": 3, "top_p": 0.99}], FINE),
}


def good_calls(count: int, max_new: int, opening: int) -> list[dict]:
  rng, out, seen = random.Random(0), [], set()
  while len(out) < count:
    numbers = [str(rng.randint(1, 9)) for _ in range(rng.randint(3, 6))]
    prompt = ("1+2-" * (opening // 4) if opening and rng.random() < 0.5 else "")
    prompt += "".join(n + rng.choice("+-") for n in numbers)[:-1] + ">"
    if prompt in seen:
      continue
    seen.add(prompt)
    out.append({"prompt": prompt, "max_tokens": rng.randint(8, max_new), "seed": len(out), "n": rng.choice([1, 1, 1, 2, 4]),
                "temperature": rng.choice([0, 0.7, 1, 1.5]), "top_p": rng.choice([1, 1, 0.9]), "stream": rng.random() < 0.5})
  return out


class Hostile:
  """Hostile calls in turn, and those that got another answer than is right."""

  def __init__(self, port: int, leaves: dict):
    self.port, self.leaves, self.asked, self.wrong = port, leaves, 0, {}
    self.cases = [(kind, body, right) for kind, (bodies, right) in HOSTILE.items() for body in bodies]

  def one(self, i: int) -> None:
    self.asked += 1
    if i % 3 == 0:  # a client that leaves in the middle
      return void(post(self.port, self.leaves, hang_up=True))
    if i % 20 == 1:  # half a body, and gone; a foreign host's name
      with socket.create_connection(("127.0.0.1", self.port)) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
      return self.expect("foreign host", post(self.port, {"prompt": SUM}, headers={"Host": "evil.example"}).status, BAD)
    kind, body, right = self.cases[i % len(self.cases)]
    reply = post(self.port, body)
    while reply.status == 429 and right is FINE:
      time.sleep(0.05)
      reply = post(self.port, body)
    self.expect(kind, reply.status, right)

  def expect(self, kind: str, status: int, right: range) -> None:
    if status not in right:
      self.wrong.setdefault(kind, []).append(status)


def void(_) -> None:
  """Nothing is to be learned from it."""


def resident(pid: int) -> float:
  """MiB of a process and those that it started."""
  try:
    mine = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
  except FileNotFoundError:  # a worker that has just ended
    return 0.0
  started = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
  return mine + sum(map(resident, map(int, started.split())))


def told(port: int, path: str) -> str:
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
  connection.request("GET", path)
  out = connection.getresponse().read().decode()
  connection.close()
  return out


def soak(process, port: int, args) -> dict:
  """The calls, and what became of them."""
  rng, calls = random.Random(1), good_calls(args.distinct, args.max_new, args.opening)
  alone = [post(port, call).texts for call in calls]
  hostile = Hostile(port, calls[0] | {"stream": True, "n": 4, "max_tokens": args.max_new})
  jobs = ["hostile" if rng.random() < args.hostile else rng.randrange(len(calls)) for _ in range(args.calls)]
  outcomes, small, memory, start, lock = [], [], [resident(process.pid)], time.monotonic(), threading.Lock()

  def one(number: int) -> None:
    job, begun = jobs[number], time.monotonic()
    if begun - start > 60 * args.minutes:
      return
    if job == "hostile":
      hostile.one(number)
      return
    reply = post(port, calls[job])
    while reply.status == 429:
      time.sleep(0.05)
      reply = post(port, calls[job])
    with lock:
      outcomes.append("lost" if reply.texts is None else "right" if reply.texts == alone[job] else "another's")
      if calls[job]["n"] == 1:
        small.append(time.monotonic() - begun)
      if len(outcomes) % max(1, args.calls // 10) == 0:
        memory.append(resident(process.pid))

  with ThreadPoolExecutor(args.together) as pool:
    list(pool.map(one, range(len(jobs))))
  seconds = time.monotonic() - start
  time.sleep(1)
  memory.append(resident(process.pid))
  return {"calls": len(outcomes) + hostile.asked, "asked_for": args.calls, "together": args.together,
          "seconds": round(seconds, 1), **{name: outcomes.count(name) for name in ("right", "another's", "lost")},
          "alone_lost": alone.count(None),
          "hostile": hostile.asked, "hostile_wrong": hostile.wrong, "median_s": round(quantile(small, 0.5) or 0, 3),
          "p99_s": round(quantile(small, 0.99) or 0, 3), "memory_mib": [round(m) for m in memory],
          "prefix_hits": int(float(told(port, "/metrics").partition("\narrol_prefix_cache_hits_total ")[2].split()[0])),
          **{name: n for name, n in json.loads(told(port, "/health")).items() if name in ("running", "waiting", "scoring")}}


def drain(process, port: int, args) -> dict:
  """SIGTERM once `together` streams have begun to be answered; every second one goes on as long as it may."""
  connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=120) for _ in range(args.together)]
  for i, connection in enumerate(connections):
    body = {"prompt": SUM, "stream": True, "max_tokens": args.max_new, "ignore_eos": bool(i % 2), "seed": i}
    connection.request("POST", "/v1/completions", json.dumps(body))
  answers = [connection.getresponse() for connection in connections]
  process.send_signal(signal.SIGTERM)
  start = time.monotonic()
  with ThreadPoolExecutor(len(answers)) as pool:
    ended = sum(r.texts is not None for r in pool.map(lambda answer: streamed(answer, 1, start), answers))
  said = process.stdout.read().strip()
  return {"streams": len(answers), "ended": ended, "cut": len(answers) - ended, "said": said,
          "told_cut": int((re.search(r"stopped: (\d+) calls", said) or [0, 0])[1]),
          "drain_s": round(time.monotonic() - start, 1), "status": process.wait(60)}


def failures(result: dict, drained: dict, args) -> list[str]:
  """What is not as it should be."""
  memory, none = result["memory_mib"], ("lost", "another's", "alone_lost", "running", "waiting", "scoring")
  out = [name for name in none if result[name]]
  out += ["nothing was answered"] if not result["right"] else []
  out += ["no prefix was kept"] if args.opening and not result["prefix_hits"] else []
  out += [f"hostile: {kind}" for kind in result["hostile_wrong"]]
  out += ["p99 of small calls above 5 medians"] if result["p99_s"] > 5 * result["median_s"] else []
  out += ["memory grows"] if memory[-1] > 1.15 * memory[len(memory) // 2] + 64 else []
  out += ["the drain took too long"] if drained["drain_s"] > args.drain + 10 else []
  out += ["the server did not say what it cut"] if drained["cut"] != drained["told_cut"] else []
  out += ["exit status"] if drained["status"] != (1 if drained["cut"] else 0) else []
  return out


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  for name, default in {"calls": 5000, "together": 64, "distinct": 200, "max_new": 48, "drain": 20, "opening": 0}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
  for name, default in {"hostile": 0.05, "minutes": 60.0}.items():
    parser.add_argument(f"--{name}", type=float, default=default)
  parser.add_argument("--config", default="quickstart")
  parser.add_argument("--out", help="a file for the line, besides stdout")
  args, passed = parser.parse_known_args()
  passed += [] if any(flag.startswith("--deterministic") for flag in passed) else ["--deterministic=true"]
  command = [sys.executable, "-m", "arrol_jax.serve", f"--config={args.config}", "--port=0", f"--drain={args.drain}", *passed]
  with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
    line = process.stdout.readline()
    if not line.startswith("serving "):
      log.seek(0)
      sys.exit(f"error: the server did not start: {(log.read().strip().splitlines() or ['it said nothing'])[-1]}")
    port = int(line.rsplit(":", 1)[1])
    try:
      result = soak(process, port, args)
      drained = drain(process, port, args)
    finally:
      process.kill()
    log.seek(0)
    tracebacks = log.read().count("Traceback")
  failed = failures(result, drained, args) + (["tracebacks in the server's log"] if tracebacks else [])
  line = {**result, "drain": drained, "failed": failed,
          "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
          "command": " ".join(["python -m experiments.serve_soak",
                               *(flag for flag in sys.argv[1:] if not flag.startswith("--out"))])}
  print(json.dumps(line), flush=True)
  if args.out:
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(line) + "\n")
  sys.exit(bool(failed))


if __name__ == "__main__":
  main()
