"""The counter-case of quickstart: errors fall at random places, so no head can foresee them.

Command:  python -m arrol_jax.train --config=configs/quickstart_clean.py --workdir=runs/clean
Hardware: 2 CPU cores.
Expected: head_auc_within stays near 0.5 (0.50 over steps 6-40, seed 0), and 40 steps hardly move the policy (31% -> 32%,
intervals of 4.6 points).
"""

from configs import quickstart


def get_config():
  c = quickstart.get_config()
  c.model.path = "experiments/arithmetic/clean"
  return c
