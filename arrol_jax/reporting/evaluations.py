"""Results of evaluations as a table that people read: a command prints it, a page shows it."""

from collections.abc import Iterable

RATES = ("maj", "rank", "posterior", "logit", "best", "deepconf_mean", "deepconf_bottom10", "deepconf_lowest", "deepconf_tail",
         "pass")


def table(results: Iterable[tuple[str, dict]]) -> list[list[str]]:
  """Header and a row for each (name, what evaluation.measure gave): accuracy in percent with half of its 95% interval, and what
  was measured with it. Columns that no row has are left out."""
  columns = {"accuracy": lambda x: _percent(x.get("accuracy"), x.get("ci95")), "reward": lambda x: _number(x.get("reward")),
             "problems": lambda x: _count(x.get("problems")), "samples": lambda x: _count(x.get("samples")),
             "tokens a response": lambda x: _count(x.get("response_len")), "cut off": lambda x: _percent(x.get("truncated")),
             "stopped": lambda x: _percent(x.get("stopped") or None), "ungraded": lambda x: _percent(x.get("ungraded"))}
  rows = [[name, *(of(x) for of in columns.values())] for name, x in results]
  used = [0, *(i for i in range(1, len(columns) + 1) if any(row[i] for row in rows))]
  return [[row[i] for i in used] for row in [["", *columns], *rows]]


def votes(results: Iterable[tuple[str, dict]]) -> list[list[str]]:
  """Header and a row for each vote and pass@k, a column for each (name, results) that has any; [] where none has. In percent with
  the larger side of the bootstrap's 95% interval."""
  results = [(name, x) for name, x in results if any("@" in key for key in x)]
  names = dict.fromkeys(key for kind in RATES for _, x in results for key in x
                        if key.startswith(f"{kind}@") and not key.endswith("_ci"))
  rows = [[name, *(_percent(x.get(name), _half(x.get(name), x.get(f"{name}_ci"))) for _, x in results)] for name in names]
  return [["", *(name for name, _ in results)], *rows] if rows else []


def text(rows: list[list[str]]) -> str:
  """The table in columns of a terminal: names to the left, figures to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ["  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]
  return "\n".join(line.rstrip() for line in lines)


def with_sampled(results: dict) -> list[tuple[str, dict]]:
  """(name, results) of each source, and of its sampled responses where there are any."""
  out = []
  for name, x in results.items():
    out.append((name, x))
    if isinstance(x.get("sampled"), dict):
      out.append((f"{name}, sampled", x["sampled"]))
  return out


def _half(value, interval) -> float | None:
  if value is None or not isinstance(interval, list) or None in interval:
    return None
  return max(value - interval[0], interval[1] - value)


def _percent(value, half=None) -> str:
  if value is None:
    return ""
  return f"{100 * value:.1f}%" + ("" if half is None else f" ±{100 * half:.1f}")


def _number(value) -> str:
  return "" if value is None else f"{value:.3f}"


def _count(value) -> str:
  return "" if value is None else f"{value:,.0f}"
