"""How strong the ridge behind the quality head should be, by how much was seen: AUC on new data, for widths and numbers of rows.

  python -m experiments.ridge_strength

Synthetic: correlated features (spectrum 1 / i^0.9), a logit linear in them with weights alike in every direction, so that the
best possible AUC is about 0.70, near what a middle layer's mean state tells within a prompt. Strength: rollouts a
feature (learning/ridge.py), beside the same as a share of the correlation matrix's diagonal. Three draws each, NumPy, a minute
on a core.
"""

import numpy as np

from arrol_jax.learning.metrics import auc

ROWS, WIDTHS, STRENGTHS = (512, 1024, 2048, 4096, 8192), (224, 896), (0.5, 2.0, 8.0, 32.0, 128.0)
SHARES = (0.125, 0.5, 2.0)
TEST = 4000


def data(width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Standardised features f64[N,width] and labels f64[N]."""
  rng = np.random.default_rng(seed)
  spectrum = np.arange(1, width + 1) ** -0.9
  x = rng.normal(size=(ROWS[-1] + TEST, width)) * np.sqrt(spectrum * width / spectrum.sum())
  logit = x @ rng.normal(size=width)
  logit *= 0.75 / logit.std()
  label = (rng.random(len(x)) < 1 / (1 + np.exp(1.5 - logit))).astype(float)
  x = x @ np.linalg.qr(rng.normal(size=(width, width)))[0]
  return x / x.std(0), label


def judged(x: np.ndarray, y: np.ndarray, rows: int, diagonals: list[float]) -> list[float]:
  """AUC on the last rows of ridges on the first `rows`, by what is added to the correlation matrix's diagonal."""
  seen = x[:rows] - x[:rows].mean(0)
  products, right = seen.T @ seen / rows, seen.T @ (y[:rows] - y[:rows].mean()) / rows
  fits = [np.linalg.solve(products + d * np.eye(x.shape[1]), right) for d in diagonals]
  return [auc(x[-TEST:] @ w, y[-TEST:]) for w in fits]


def main():
  names = [f"{s:g} a feature" for s in STRENGTHS] + [f"{s:g} of the diagonal" for s in SHARES]
  print(f"| width, rows | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
  for width in WIDTHS:
    draws = [data(width, seed) for seed in range(3)]
    for rows in ROWS:
      diagonals = [s * width / rows for s in STRENGTHS] + list(SHARES)
      means = np.mean([judged(x, y, rows, diagonals) for x, y in draws], axis=0)
      print(f"| {width}, {rows} | {' | '.join(f'{m:.3f}' for m in means)} |", flush=True)


if __name__ == "__main__":
  main()
