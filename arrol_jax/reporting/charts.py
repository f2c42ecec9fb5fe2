"""Line charts and stacked areas as SVG text, in the colours of page.css. What is drawn is also there as data, for page.js to read
out under the pointer.
"""

import dataclasses
import html
import math

import numpy as np

from arrol_jax.reporting.run_folder import smooth

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 36  # margins around the plot
MOST_POINTS = 300


@dataclasses.dataclass(frozen=True)
class Series:
  """A line: x and y f64[n], NaN where there is nothing. points: few values far apart, which are marked."""
  name: str
  x: np.ndarray
  y: np.ndarray
  points: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
  """unit: what the y axis is called. smoothed: values faint, their mean over 5 steps strong. level: a line across, such as that
  of chance. stacked: areas one upon the other; single peaks far above the rest are cut off."""
  title: str
  unit: str
  series: tuple[Series, ...]
  note: str = ""
  smoothed: bool = False
  stacked: bool = False
  level: float | None = None
  least: float | None = None   # value that the axis begins with, unless there are smaller ones,
  most: float | None = None    # and ends with


def figure(chart: Chart, number: int) -> str:
  """The chart with its title, legend and note; "" where it has no value."""
  series = [s for s in chart.series if np.isfinite(s.y).any()]
  if not series:
    return ""
  names = "".join(f'<span><i class="c{i % 6}"></i>{html.escape(s.name)}</span>' for i, s in enumerate(series))
  note = f"<p>{html.escape(chart.note)}</p>" if chart.note else ""
  return (f'<figure data-chart="{number}"><figcaption>{html.escape(chart.title)}</figcaption>{svg(chart, series)}'
          f'<div class="legend">{names}</div><output></output>{note}</figure>')


def data(chart: Chart) -> dict:
  """What page.js needs of a chart to read it out: the plot's place, the axis of steps, and values by series."""
  series = [_thin(s) for s in chart.series if np.isfinite(s.y).any()]
  x = sorted({float(v) for s in series for v in s.x})
  known = lambda s: {float(a): float(b) for a, b in zip(s.x, s.y, strict=True) if math.isfinite(b)}
  return {"left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH, "x": x, "range": _x_range(series), "series": [
    {"name": s.name, "y": [known(s).get(v) for v in x]} for s in series]}


def svg(chart: Chart, series: list[Series]) -> str:
  series = [_thin(s) for s in series]
  low, high = _x_range(series)
  ticks = nice_ticks(*_y_range(chart, series))
  bottom, top = ticks[0], ticks[-1]
  at_x = lambda x: LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)
  at_y = lambda y: max(TOP, TOP + (top - y) / (top - bottom) * (HEIGHT - TOP - BOTTOM))
  out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(f"{chart.title}: {chart.unit} by step")}">']
  for y in ticks:
    out.append(f'<path class="grid" d="M{LEFT} {at_y(y):.1f}H{WIDTH - RIGHT}"/>'
               f'<text x="{LEFT - 5}" y="{at_y(y) + 3.5:.1f}" class="end">{tick_text(y, ticks)}</text>')
  for x in (t for t in nice_ticks(low, high, whole=True) if low <= t <= high):
    out.append(f'<text x="{at_x(x):.1f}" y="{HEIGHT - BOTTOM + 14}" class="mid">{x:,.0f}</text>')
  out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" class="mid name">step</text>'
             f'<text transform="translate(10 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" class="mid name">'
             f'{html.escape(chart.unit)}</text>')
  if chart.level is not None:
    out.append(f'<path class="level" d="M{LEFT} {at_y(chart.level):.1f}H{WIDTH - RIGHT}"/>')
  out += _areas(series, at_x, at_y) if chart.stacked else _lines(chart, series, at_x, at_y)
  out.append(f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}"/></svg>')
  return "".join(out)


def _lines(chart: Chart, series: list[Series], at_x, at_y) -> list[str]:
  out = []
  for i, s in enumerate(series):
    color = f"c{i % 6}"
    if chart.smoothed and len(s.x) > 10:
      out.append(f'<path class="line faint {color}" d="{_path(s.x, s.y, at_x, at_y)}"/>')
      s = dataclasses.replace(s, y=smooth(s.y))
    out.append(f'<path class="line {color}" d="{_path(s.x, s.y, at_x, at_y)}"/>')
    alone = np.isfinite(s.y) if s.points or np.isfinite(s.y).sum() == 1 else np.zeros(len(s.y), bool)
    out += [f'<circle class="{color}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3"/>' for x, y in zip(s.x[alone], s.y[alone])]
  return out


def _areas(series: list[Series], at_x, at_y) -> list[str]:
  out, below = [], np.zeros(len(series[0].x))
  for i, s in enumerate(series):
    above = below + np.nan_to_num(s.y)
    x, y = np.concatenate([s.x, s.x[::-1]]), np.concatenate([above, below[::-1]])
    out.append(f'<path class="area c{i % 6}" d="{_path(x, y, at_x, at_y)}Z"/>')
    below = above
  return out


def _path(x: np.ndarray, y: np.ndarray, at_x, at_y) -> str:
  """Lines through what is finite. Steps without a value are passed over where others are many, as those between evaluations."""
  fine = np.isfinite(y)
  return "".join(f"{'L' if i else 'M'}{at_x(a):.1f} {at_y(b):.1f}" for i, (a, b) in enumerate(zip(x[fine], y[fine], strict=True)))


def _thin(s: Series) -> Series:
  """At most MOST_POINTS points: means of as many steps each."""
  if s.points:
    fine = np.isfinite(s.y)
    s = dataclasses.replace(s, x=s.x[fine], y=s.y[fine])
  if len(s.x) <= MOST_POINTS:
    return s
  parts = np.array_split(np.arange(len(s.x)), MOST_POINTS)
  mean = lambda y: np.array([np.nanmean(y[p]) if np.isfinite(y[p]).any() else np.nan for p in parts])
  return dataclasses.replace(s, x=mean(s.x), y=mean(s.y))


def _x_range(series: list[Series]) -> tuple[float, float]:
  low, high = min(float(s.x.min()) for s in series), max(float(s.x.max()) for s in series)
  return (low, high) if high > low else (low - 1, high + 1)


def _y_range(chart: Chart, series: list[Series]) -> tuple[float, float]:
  values = [s.y[np.isfinite(s.y)] for s in series]
  if chart.stacked:
    total = np.sum([np.nan_to_num(s.y) for s in series], axis=0)
    usual = np.percentile(total, 90)
    values = [np.minimum(total, 1.5 * usual) if total.max() > 3 * usual > 0 else total]
  all_of = np.concatenate([*values, [] if chart.level is None else [chart.level]])
  low, high = float(all_of.min()), float(all_of.max())
  return min(low, chart.least or 0.0) if chart.least is not None else low, max(high, chart.most or high)


def nice_ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
  """About `count` round numbers from at most `low` to at least `high`; whole: whole numbers."""
  if not high - low > 1e-12 * max(abs(low), abs(high), 1e-300):
    low, high = (low - abs(low) / 2, high + abs(high) / 2) if low or high else (0.0, 1.0)
  rough = (high - low) / count
  unit = 10.0 ** math.floor(math.log10(rough))
  step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= rough * 0.999)
  if whole:
    step = max(1.0, math.ceil(step))
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [step * i for i in range(first, last + 1)]


def tick_text(value: float, ticks: list[float]) -> str:
  """A tick as short as its distance to the next allows."""
  step, largest = ticks[1] - ticks[0], max(map(abs, ticks))
  if largest >= 1e5 or 0 < largest < 1e-3:
    return f"{value:.2g}" if value else "0"
  decimals = next((n for n in range(8) if abs(round(step, n) - step) < 1e-6 * step), 8)
  return f"{value:,.{decimals}f}"
