"""All tables and figures of all scales and the trial in one HTML file, plots inside:

  python -m experiments.report [--out=runs/report.html]

Also writes each scale's tables.md and plots beside its results.

  python -m experiments.report --run [--scale=cpu|gpu|paper] [--minutes=9] [--model=PATH] [--data=DIR]    # runs first
"""

import base64
import html
import io
import json
from pathlib import Path
import re
import sys

from arrol_jax import config
from arrol_jax.reporting.page import style
from experiments import figure2, figure4, runs, table1, table2, table3, table4, table5, table6, tables, trial_arms, trial_page
from experiments.runs import Scale

# Wide tables: long heads wrap, little between columns; plots stand below their tables.
STYLE = """
body { max-width: 95rem } th, td { padding: .2rem .45rem; font-size: 13px } th, td:last-child { white-space: normal }
th { vertical-align: bottom } img { margin: 1em 0 }
"""
BUILDS = (table1.build, table2.build, table3.build, table4.build, table5.build, table6.build, figure2.build, figure4.build)


def plot_of(figure) -> str:
  """The figure as an inlined PNG, "" if nothing was drawn."""
  if not figure.axes:
    return ""
  out = io.BytesIO()
  figure.savefig(out, format="png", dpi=90)
  return f'<img alt="plot" src="data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}">'


def settings(built: list[tables.Table]) -> str:
  """Each training's settings, command and times."""
  jobs = {job.name: job for table in built for job in table.jobs if job.workdir and job.done}
  out = []
  for name, job in sorted(jobs.items()):
    summary, folder = runs.summary(job), job.result.parent
    pieces = runs.lines(folder / "run.jsonl") if (runs.ROOT / folder / "run.jsonl").exists() else []
    about = {"device": summary["device"], "seconds": round(summary["seconds"], 1), "steps": summary["steps"],
             "pieces": [{k: v for k, v in x.items() if k != "command"} for x in pieces]}
    command = pieces[-1]["command"] if pieces else "see the README of these results; " + job.command
    text = f"{command}\n{json.dumps(about)}\n{(runs.ROOT / folder / 'config.json').read_text()}"
    out.append(f"<details><summary>{html.escape(name)}: {summary['device']}, {summary['steps']} steps, "
               f"{summary['seconds']:.0f} s</summary><pre>{html.escape(text)}</pre></details>")
  return "<h3>Runs and their settings</h3>" + ("\n".join(out) or "<p>None yet.</p>")


def part(scale: Scale) -> str:
  """One scale's tables, plots and runs."""
  drawn = [tables.draw(build, scale) for build in BUILDS]
  write_markdown(scale, drawn)
  body = "\n".join(table.html() + plot_of(figure) for table, figure in drawn)
  return (f'<h2 id="{scale.name}">Scale: {scale.name}</h2><p>{html.escape(scale.model)}; {html.escape(scale.data)}.</p>{body}'
          + ("" if scale.trial else settings([table for table, _ in drawn])))


def write_markdown(scale: Scale, drawn: list) -> None:
  """tables.md with its plots, where the scale has results."""
  folder = runs.ROOT / scale.results
  if folder.is_dir():
    parts = [table.markdown() + (f"\n\n![{table.name}]({table.name}.png)" if tables.save(table, figure) else "")
             for table, figure in drawn]
    head = "# The paper's tables at this scale\n\nMade by `python -m experiments.report`."
    (folder / "tables.md").write_text("\n\n".join([head, *parts]) + "\n")


# ---- the trial


def trial() -> str:
  """The trial's page (trial_page.py) of all regimes that have results."""
  folder = trial_arms.ROOT / trial_arms.RESULTS
  regimes = [regime for regime in trial_arms.REGIMES.values() if (folder / regime.name).is_dir()]
  if not regimes:
    return '<h2 id="trial">The trial</h2><p>Not run: <code>python -m experiments.trial --run</code></p>'
  return html_of(trial_page.page(regimes), folder)


def html_of(page: str, folder: Path) -> str:
  """What trial_page.page writes, as HTML with the plots of `folder` inside: headings, tables, lists, images and paragraphs."""
  inline = lambda text: re.sub("`(.+?)`", r"<code>\1</code>", html.escape(text))
  row = lambda line, tag: "<tr>" + "".join(f"<{tag}>{inline(x.strip())}</{tag}>" for x in line.strip("|").split("|")) + "</tr>"
  out = []
  for block in re.split(r"\n\n+", page.strip()):
    lines = block.split("\n")
    if block.startswith("#"):
      level = len(block) - len(block.lstrip("#")) + 1
      name = ' id="trial"' if level == 2 else ""
      out.append(f"<h{level}{name}>{inline(block.lstrip('# '))}</h{level}>")
    elif block.startswith("|"):
      out.append('<div class="wide"><table>' + row(lines[0], "th") + "".join(row(x, "td") for x in lines[2:]) + "</table></div>")
    elif block.startswith("- "):
      out.append("<ul>" + "".join(f"<li>{inline(x[2:])}</li>" for x in lines) + "</ul>")
    elif image := re.fullmatch(r"!\[(.+)\]\((.+)\)", block):
      data = base64.b64encode((folder / image[2]).read_bytes()).decode()
      out.append(f'<img alt="{html.escape(image[1])}" src="data:image/png;base64,{data}">')
    else:
      out.append(f"<p>{inline(' '.join(lines))}</p>")
  return "\n".join(out)


def page() -> str:
  links = " ".join(f'<a href="#{name}">{name}</a>' for name in (*runs.SCALES, "trial"))
  return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><title>arrol_jax: the paper\'s tables</title>'
          f"<style>{style()}{STYLE}</style></head><body><h1>arrol_jax: the paper's tables and figures</h1><p>Scales: {links}. "
          "Figures of one scale say nothing about another. ± is a 95% interval; in brackets, each seed. Verdicts are computed "
          "from the figures.</p>"
          + "\n".join([*(part(scale) for scale in runs.SCALES.values()), trial()]) + "</body></html>\n")


def main():
  out = [a.partition("=")[2] for a in sys.argv[1:] if a.startswith("--out=")]
  scale, run, minutes = tables.parse([a for a in sys.argv if not a.startswith("--out=")])
  if run:
    jobs = {job.name: job for build in BUILDS for job in tables.draw(build, scale)[0].jobs}
    finished = tables.start(scale, list(jobs.values()), minutes)
    print("all runs of this scale are there" if finished else "time is over; the same command goes on")
  path = Path(out[-1] if out else "runs/report.html")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page())
  print(f"{path}: written")


if __name__ == "__main__":
  config.run(main)
