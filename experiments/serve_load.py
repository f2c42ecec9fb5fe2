"""Calls to a server, many at a time, from a process of their own: the load of serve_soak and serve_speed. Needs no packages.

  python -m experiments.serve_load PORT TOGETHER < BODIES    # bodies as JSON lines, one reply a line, in their order

A body's "path" says where it goes (/v1/completions if it does not).
"""

from concurrent.futures import ThreadPoolExecutor
import http.client
import json
import sys
import time
from typing import NamedTuple


class Reply(NamedTuple):
  """What a call got. `times`: seconds from its start to each event with text, and `counts` its completion tokens so far where
  events tell (continuous_usage_stats)."""
  status: int
  texts: list[str] | None   # None: it got none, or its stream broke off
  seconds: float
  tokens: int | None = None
  times: list[float] = []
  counts: list[int] = []
  error: str | None = None
  vote: dict | None = None


def post(port: int, body: dict | bytes, timeout: float = 120, headers: dict | None = None, hang_up: bool = False) -> Reply:
  """One call; hang_up: leaves after the first event."""
  path = body.get("path", "/v1/completions") if isinstance(body, dict) else "/v1/completions"
  raw = body if isinstance(body, bytes) else json.dumps({k: v for k, v in body.items() if k != "path"}).encode()
  connection, start = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout), time.monotonic()
  try:
    connection.request("POST", path, raw, headers or {})
    answer = connection.getresponse()
    if hang_up:
      answer.readline()
      return Reply(answer.status, None, time.monotonic() - start)
    if answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream"):
      return streamed(answer, body.get("n", 1), start)
    said, seconds = json.loads(answer.read()), time.monotonic() - start
    if answer.status != 200:
      return Reply(answer.status, None, seconds, error=said["error"]["message"])
    return Reply(200, [text_of(choice) for choice in said["choices"]], seconds, said["usage"]["completion_tokens"],
                 vote=said.get("vote"))
  finally:
    connection.close()


def text_of(choice: dict) -> str:
  return choice["text"] if "text" in choice else (choice.get("message") or choice["delta"]).get("content") or ""


def streamed(answer: http.client.HTTPResponse, n: int, start: float) -> Reply:
  """A stream to its end."""
  texts, times, counts, finished, error, whole = [""] * n, [], [], 0, None, False
  for line in answer:
    if not line.startswith(b"data: "):
      continue
    if line == b"data: [DONE]\n":
      whole = True
      break
    event = json.loads(line[6:])
    error = event["error"]["message"] if "error" in event else error
    for choice in event.get("choices", []):
      texts[choice["index"]] += text_of(choice)
      finished += choice["finish_reason"] is not None
      times.append(time.monotonic() - start)
      counts.append((event.get("usage") or {}).get("completion_tokens"))
  good = whole and finished == n and error is None
  return Reply(200, texts if good else None, time.monotonic() - start, counts[-1] if counts else None, times, counts, error)


def together(port: int, bodies: list[dict], at_once: int, timeout: float = 300) -> list[Reply]:
  """All calls, `at_once` at a time; a full server is asked again."""
  def one(body):
    reply = post(port, body, timeout)
    while reply.status == 429:
      time.sleep(0.05)
      reply = post(port, body, timeout)
    return reply

  with ThreadPoolExecutor(at_once) as pool:
    return list(pool.map(one, bodies))


def quantile(values: list[float], q: float) -> float | None:
  """The value below which a share q lies; None where there is none."""
  return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else None


def main():
  if len(sys.argv) != 3:
    sys.exit(__doc__)
  start = time.monotonic()
  replies = together(int(sys.argv[1]), [json.loads(line) for line in sys.stdin], int(sys.argv[2]))
  for reply in replies:
    print(json.dumps(reply._asdict(), ensure_ascii=False))
  print(json.dumps({"seconds": time.monotonic() - start}))


if __name__ == "__main__":
  main()
