"""A mirror of the Hugging Face hub on loopback, and data sets in the layouts that the hub has them in."""

import contextlib
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
from pathlib import Path
import re
import threading
from urllib.parse import unquote, urlparse

import pyarrow as pa
from pyarrow import parquet

SHA = "0123456789abcdef0123456789abcdef01234567"
GATED = "meta-llama/Llama-3.2-1B-Instruct"
DAPO = ("Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
        "(without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
        "Remember to put your answer on its own line after \"Answer:\".")
DAPO_ROWS = [("One?", "34"), ("Two?", "5"), ("Both?", "1")] * 2 + [("Both?", "2"), ("One?", "34")]

# repository -> file -> rows, with the columns that the hub has (images and other unused ones stand for the rest)
MATH = ("problem", "level", "type", "solution")
REPOSITORIES = {
  "openai/gsm8k": {
    "main/train-00000-of-00001.parquet": [
      {"question": "How many?", "answer": "48/2 = <<48/2=24>>24\n#### 72"}, {"question": "And now?", "answer": "So\n#### 1,200"}],
    "main/test-00000-of-00001.parquet": [{"question": "How much?", "answer": "It is\n#### 18"}],
    "socratic/train-00000-of-00001.parquet": [{"question": "Socratic", "answer": "#### 0"}],
    "socratic/test-00000-of-00001.parquet": [{"question": "Socratic", "answer": "#### 0"}]},
  "EleutherAI/hendrycks_math": {
    f"{subject}/{split}-00000-of-00001.parquet": [
      dict(zip(MATH, (f"{subject} {split}", "Level 5", subject, rf"First \boxed{{0}}, then \boxed{{\frac{{{n}}}{{2}}}}."))),
      dict(zip(MATH, (f"{subject} {split} without an answer", "Level 1", subject, "Look at the figure.")))]
    for n, subject in enumerate(("algebra", "geometry")) for split in ("train", "test")},
  "HuggingFaceH4/MATH-500": {"test.jsonl": [
    {"problem": "Convert $(0,3)$.", "solution": r"So \boxed{1}.", "answer": r"\left( 3, \frac{\pi}{2} \right)",
     "subject": "Precalculus", "level": 2, "unique_id": "test/precalculus/807.json"}]},
  "BytedTsinghua-SIA/DAPO-Math-17k": {"data/dapo-math-17k.parquet": [
    {"data_source": "math_dapo", "prompt": [{"content": DAPO.format(problem), "role": "user"}], "ability": "MATH",
     "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": str(i)}}
    for i, (problem, answer) in enumerate(DAPO_ROWS)]},
  "HuggingFaceH4/aime_2024": {"data/train-00000-of-00001.parquet": [
    {"id": 60, "problem": "Aya walks.", "solution": r"\boxed{999}", "answer": "204", "url": "u", "year": "2024"}]},
  "opencompass/AIME2025": {"aime2025-I.jsonl": [{"question": "Find the sum.", "answer": "70"}],
                           "aime2025-II.jsonl": [{"question": "Find $b$.", "answer": "237"}]},
  "math-ai/amc23": {"test-00000-of-00001.parquet": [
    {"id": 0, "answer": "27.0", "url": "u", "question": "Cities"}, {"id": 1, "answer": "2.5", "url": "u", "question": "Towns"}]},
  "math-ai/minervamath": {"test.jsonl": [{"question": "Each of the two telescopes", "answer": "4.5e33"}]},
  "Hothan/OlympiadBench": {
    "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet": [
      {"id": 1606, "question": "Xenia", "solution": ["long"], "final_answer": ["$2$"], "context": None, "image_1": None},
      {"id": 1610, "question": "Solve.", "solution": ["x"], "final_answer": ["$69$,$84$"], "context": "Let $n$ be.",
       "image_1": None},
      {"id": 1611, "question": "Prove.", "solution": ["x"], "final_answer": None, "context": None, "image_1": None}],
    "OlympiadBench/OE_TO_maths_zh_COMP/OE_TO_maths_zh_COMP.parquet": [{"id": 1, "question": "?", "final_answer": ["$3$"]}]},
}


def write_repository(folder: Path, files: dict) -> None:
  """A repository's files as the hub serves them."""
  for name, rows in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
      parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
      path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_hub(folder: Path) -> None:
  for name, files in REPOSITORIES.items():
    write_repository(folder / "datasets" / name, files)


@contextlib.contextmanager
def mirror(folder: Path):
  """Serves folder/datasets/OWNER/NAME and folder/models/OWNER/NAME; yields its address and the paths asked for."""
  asked = []

  class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
      path = unquote(urlparse(self.path).path)
      asked.append(f"{self.command} {path}")
      listing = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/[^/]+", path)
      file = re.fullmatch(r"/(datasets/|)([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
      kind, name = (listing[1], listing[2]) if listing else ("datasets" if file[1] else "models", file[2])
      repository = folder / kind / name
      if name == GATED:
        return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for it"})
      if not repository.is_dir():
        return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
      if file:
        data = (repository / file[3]).read_bytes()
        return self.answer(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": SHA})
      files = sorted(p for p in repository.rglob("*") if p.is_file())
      if listing[3] == "tree":
        rows = [{"type": "file", "path": p.relative_to(repository).as_posix(), "size": p.stat().st_size, "oid": SHA}
                for p in files]
        return self.answer(200, json.dumps(rows).encode(), {})
      siblings = [{"rfilename": p.relative_to(repository).as_posix()} for p in files]
      self.answer(200, json.dumps({"id": name, "sha": SHA, "siblings": siblings, "tags": [], "private": False}).encode(), {})

    do_HEAD = do_GET

    def answer(self, status, body, headers):
      self.send_response(status)
      for key, value in ({"Content-Length": len(body), "Content-Type": "application/json"} | headers).items():
        self.send_header(key, str(value))
      self.end_headers()
      if self.command == "GET":
        self.wfile.write(body)

    def log_message(self, *_):
      pass

  with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
      server.shutdown()
      thread.join()
