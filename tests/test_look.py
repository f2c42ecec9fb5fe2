"""A run's page: what it shows of a run, that nothing in a text can break out of it, and that it stays small."""

from html.parser import HTMLParser
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from arrol_jax import config as configuration, look
from arrol_jax.data.problems import Problem
from arrol_jax.reporting import charts, evaluations, page, run_folder
from arrol_jax.running.workdir import Logs
from arrol_jax.types import Rollout

HOSTILE = '</script><script>document.title = "taken"</script><!-- \x00\x1b[31m \u202e \ud800 &amp;'


def member(i, tokens, **fields):
  """One of a prompt's four; decisions at 8 and 16 tokens."""
  return Rollout(i, 0, None, np.zeros(tokens, np.int32), None, problem=Problem("p7", "2+2>", "4", "sums"), **fields)


GROUP = [
  member(0, 8, pruned=True, scores=(-1.0,), posteriors=(0.25,), keep_probabilities=(0.6,), text=HOSTILE),
  member(1, 20, scores=(0.5, 1.5), posteriors=(0.5, 0.75), keep_probabilities=(0.5, 0.4), keep_probability=0.2,
         reward=1.0, stopped=True, text="A4", reason="correct"),
  member(2, 5, reward=0.0, stopped=True, text="A5", reason="wrong"),
  member(3, 48, scores=(0.0, 0.0), posteriors=(0.5, 0.5), keep_probabilities=(1.0, 1.0), reward=0.0, text="A6")]
CONFIG = {"steps": 5, "rollout": {"prompts": 1}, "prune": {"detect": [0, 8, 16]}, "log": {"rollouts": 4}}


def line(step):
  return {"step": step, "reward": 0.5, "reward_ipw": 0.25, "keep_ratio": 0.75, "head_auc@8": 0.75, "head_auc@end": None,
          "sec_generate": 2.0, "sec_update": 1.0, "grad_norm": float("nan"), "survivors_histogram": [1, 2]}


@pytest.fixture
def folder(tmp_path):
  """A run that was stopped after its second step, in the middle of a line."""
  out = tmp_path / "my run"
  out.mkdir()
  (out / "config.json").write_text(json.dumps(CONFIG))
  logs = Logs(str(out), 0, [])
  for step in (1, 2):
    logs.write(line(step), GROUP, 4)
  logs.close()
  with open(out / "metrics.jsonl", "a") as f:
    f.write('{"step": 3, "rew')
  return out


class Reader(HTMLParser):
  """Scripts and visible text of a page, as a browser reads it."""

  def __init__(self, text):
    super().__init__()
    self.scripts, self.text, self.links, self.inside = [], "", [], None
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.inside = tag
    self.scripts += [""] * (tag == "script")
    self.links += [value for name, value in attrs if name in ("src", "href")]

  def handle_endtag(self, tag):
    self.inside = None

  def handle_data(self, data):
    if self.inside == "script":
      self.scripts[-1] += data
    elif self.inside != "style":
      self.text += data + " "


def command(monkeypatch, capsys, *arguments):
  monkeypatch.setattr(sys, "argv", ["arrol-look", *map(str, arguments)])
  try:
    configuration.run(look.main)
    status = 0
  except SystemExit as e:
    status = e.code
  return SimpleNamespace(status=status, **dict(zip(("out", "err"), capsys.readouterr())))


def rollouts_of(folder):
  return json.loads(Reader(page.page(run_folder.load(folder))).scripts[0])["rollouts"]


def test_a_stopped_run_has_its_curves_named_with_units(folder, monkeypatch, capsys):
  done = command(monkeypatch, capsys, folder)
  assert done.status == 0 and done.out == f"{folder}/look.html: written\n"
  seen = Reader((folder / "look.html").read_text())
  assert "step 2 of 5, not finished" in seen.text and "prune.detect = [0, 8, 16]" in seen.text
  for title, unit in [("Reward", "reward"), ("Rollouts kept", "kept, %"), ("Quality head, all rollouts", "AUC (0.5 is chance)"),
                      ("Time", "seconds a step")]:
    assert f"{title} " in seen.text and f" {unit} " in seen.text
  assert "8 tokens" in seen.text and "Gradient" not in seen.text  # which had no number
  assert seen.links and all(link.startswith("#") for link in seen.links)  # nothing is fetched


def test_a_rollout_says_who_was_cut_where_and_why(folder):
  cut, right, early, long = rollouts_of(folder)[:4]
  assert (cut["fate"], cut["decisions"]) == ("cut", [[8, -1.0, 0.25, 0.6]])
  assert cut["why"] == ("Cut at 8 tokens: its posterior of being right was 0.25, it was to go on with probability 0.60, and the "
                        "draw said no.")
  assert right["decisions"] == [[8, 0.5, 0.5, 0.5], [16, 1.5, 0.75, 0.4]] and right["fate"] == "right"
  assert right["why"] == "It went on each time by the draw, and ended by itself at 20 tokens: reward 1 (correct)."
  assert early["decisions"] == [] and "before any decision" in early["why"] and early["fate"] == "wrong"
  assert "nothing pruned" in long["why"] and "cut off by the length limit at 48 tokens" in long["why"]
  assert right["problem"] == "2+2>" and ["right answer", "4"] in right["facts"] and ["problem", "p7"] in right["facts"]
  assert [x["member"] for x in (cut, right, early, long)] == [0, 1, 2, 3]
  assert cut["group"]["tokens"] == [8, 20, 5, 48] and cut["group"]["pruned"] == [True, False, False, False]
  assert cut["group"]["right"] == [None, 1.0, 0.0, 0.0] and cut["group"]["posterior"] == [0.25, 0.75, None, 0.5]


def test_a_hostile_text_stays_a_text(folder):
  text = page.page(run_folder.load(folder))
  seen = Reader(text)
  assert len(seen.scripts) == 2 and "taken" not in seen.text
  assert json.loads(seen.scripts[0])["rollouts"][0]["text"] == HOSTILE
  assert text.isprintable() or not {c for c in text if ord(c) < 32} - {"\n"}
  text.encode()  # no half characters


def test_a_large_run_makes_a_small_page(tmp_path):
  """All of evenly spaced steps, the last among them; a long text keeps its begin and end."""
  with open(tmp_path / "rollouts.jsonl", "w") as f:
    for step in range(1, 1001):
      for i in range(3):
        text = "a" + "x" * 10**6 + "z" if step in (1, 1000) else "short"
        f.write(json.dumps({"step": step, "prompt": i, "text": text, "tokens": 3, "pruned": False, "reward": 1.0}) + "\n")
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "reward": s / 1000}) + "\n" for s in range(1, 1001)))
  run = run_folder.load(tmp_path)
  assert len(run.rollouts) == 399 and run.found == 3000 and (run.rollouts[0]["step"], run.rollouts[-1]["step"]) == (1, 1000)
  steps = [x["step"] for x in run.rollouts[::3]]
  assert max(np.diff(steps)) - min(np.diff(steps)) <= 1
  assert "990,002 characters are not shown" in run.rollouts[0]["text"]
  assert run.rollouts[0]["text"][0] == "a" and run.rollouts[0]["text"][-1] == "z"
  text = page.page(run)
  assert len(text) < 500_000 and "399 of 3,000, those of evenly spaced steps" in text
  drawn = charts.data(page.all_charts(run)[0])
  assert len(drawn["x"]) == charts.MOST_POINTS and drawn["series"][0]["y"][0] == pytest.approx(0.0025)  # mean of steps 1 to 4


def test_lines_of_older_versions_are_shown_too(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"rollout": {"rounds": 2}, "prune": {"control": 0.5, "detect": [64]}}))
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "head_auc": 0.625}\n')
  (tmp_path / "rollouts.jsonl").write_text(
    '{"step": 1, "prompt": 0, "text": "t", "tokens": 64, "pruned": true, "score": -1.0, "posterior": 0.5, "survival": 0.5, '
    '"reward": null, "reason": ""}\n')
  (tmp_path / "summary.json").write_text(json.dumps({"steps": 1, "eval_after": {"t": {"accuracy": 0.5, "problems": 4}}}))
  seen = Reader(page.page(run_folder.load(tmp_path)))
  assert "finished: 1 steps" in seen.text and "prune.holdout = 0.5" in seen.text and "rollout.resampling = 2" in seen.text
  assert "last decision" in seen.text and "after: t 50.0%" in seen.text
  (one,) = json.loads(seen.scripts[0])["rollouts"]
  assert one["fate"] == "cut" and one["decisions"] == [[64, -1.0, 0.5, 0.5]] and one["group"] is None


def test_a_run_that_has_just_begun(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  seen = Reader(page.page(run_folder.load(tmp_path)))
  assert "No step has been logged yet" in seen.text and "step 0 of 5" in seen.text


@pytest.mark.parametrize("make, word", [
  (lambda p: None, "it has neither metrics.jsonl nor a run's config.json"),
  (lambda p: (p / "config.json").write_text('{"model_type": "qwen3"}'), "is not the folder of a run"),
  (lambda p: (p / "config.json").write_text("{"), "damaged"),
  (lambda p: p.rmdir(), "no such folder")])
def test_a_folder_that_is_no_run_is_one_line(make, word, tmp_path, monkeypatch, capsys):
  (tmp_path / "x").mkdir()
  make(tmp_path / "x")
  done = command(monkeypatch, capsys, tmp_path / "x")
  assert done.status == 2 and len(done.err.splitlines()) == 1 and word in done.err
  assert not (tmp_path / "x" / "look.html").exists()


def test_a_page_that_cannot_be_written_is_one_line(folder, monkeypatch, capsys):
  done = command(monkeypatch, capsys, folder, f"--out={folder}/none/look.html")
  assert done.status == 2 and "cannot be written" in done.err and "--out=FILE" in done.err


# ---- tables and axes


def test_tables_of_results():
  x = {"accuracy": 0.5, "ci95": 0.125, "problems": 64, "samples": 4, "response_len": 1234.5, "truncated": 0.25, "stopped": 0.0}
  votes = {"maj@4": 0.75, "maj@4_ci": [0.5, 0.875], "pass@2": 0.625, "pass@2_ci": [0.5, 0.75]}
  results = {"sums": x | {"sampled": x | votes}, "one": {"accuracy": 1.0, "ci95": None}}
  rows = evaluations.table(evaluations.with_sampled(results))
  assert rows[0] == ["", "accuracy", "problems", "samples", "tokens a response", "cut off"]
  assert rows[1] == ["sums", "50.0% ±12.5", "64", "4", "1,234", "25.0%"] and rows[3][:2] == ["one", "100.0%"]
  assert evaluations.votes(evaluations.with_sampled(results)) == [
    ["", "sums, sampled"], ["maj@4", "75.0% ±25.0"], ["pass@2", "62.5% ±12.5"]]
  assert evaluations.votes([("sums", x)]) == []
  assert evaluations.text([["", "a"], ["long", "1"]]) == "      a\nlong  1"


@pytest.mark.parametrize("low, high, ticks, texts", [
  (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0], ["0.0", "0.2"]), (0.31, 0.52, [0.3, 0.35, 0.4, 0.45, 0.5, 0.55], ["0.30", "0.35"]),
  (0.0, 0.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0], ["0.0", "0.2"]), (0.0, 1e-6, [0, 2e-7, 4e-7, 6e-7, 8e-7, 1e-6], ["0", "2e-07"]),
  (3.0, 4100.0, [0, 1000, 2000, 3000, 4000, 5000], ["0", "1,000"])])
def test_ticks_are_round_and_hold_all_values(low, high, ticks, texts):
  found = charts.nice_ticks(low, high)
  np.testing.assert_allclose(found, ticks, atol=1e-12)
  assert [charts.tick_text(t, found) for t in found[:2]] == texts


# ---- in a browser


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_browser_shows_the_hostile_text_and_runs_nothing_of_it(folder, tmp_path):
  (folder / "look.html").write_text(page.page(run_folder.load(folder)))
  chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
  text = subprocess.run([*chromium, "--dump-dom", (folder / "look.html").as_uri()], capture_output=True, text=True).stdout
  assert "<title>my run: a run of arrol_jax</title>" in text
  assert '&lt;/script&gt;&lt;script&gt;document.title = "taken"' in text and "␀␛[31m ⟨U+202E⟩ ⟨U+D800⟩ &amp;amp;" in text
  assert "Its group: 3 of 4 survived, 1 of them right" in text and "1 of 8" in text
