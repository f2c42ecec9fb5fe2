"""The plans under experiments/results/plan in one Markdown table: python -m experiments.plan_table

Each JSON file there is one run of `python -m arrol_jax.plan`; its "command" made it.
"""

import json
from pathlib import Path

PLANS = Path(__file__).parent / "results" / "plan"
COLUMNS = ("plan", "topology", "mesh", "slots", "held always", "cache", "decode segment", "update", "fullest program", "of HBM",
           "verdict", "seconds a step", "pruned", "tokens/s, pruned")


def row(name: str, plan: dict) -> tuple:
  """One plan's line; sizes in GiB a chip, with what else is held at the time."""
  gib = lambda x: f"{x / 2**30:.2f}" if x else "not compiled"
  by_name = {p["name"]: p for p in plan["programs"]}
  fullest = max(plan["programs"], key=lambda p: p["in_step"])
  mesh, held = "x".join(str(plan["mesh"][axis]) for axis in ("data", "fsdp", "tensor")), plan["held"]
  remedy = " ".join(f"{k}={v}" for k, v in (plan["fits_with"] or {}).items())
  verdict = "fits" if plan["fits"] else "does not fit" + (f"; does with {remedy}" if remedy else "")
  steps = (plan.get("time") or {}).get("steps", {})
  said = lambda case, key, form: f"{steps[case][key]:{form}}" if case in steps else ""
  return (name, plan["topology"], mesh, plan["shapes"].get("slots", "none"), gib(held["parameters, optimizer, head"]),
          gib(held.get("cache and slots", 0)), gib(by_name["decode segment"]["in_step"]), gib(by_name["update"]["in_step"]),
          f"{fullest['name']} {gib(fullest['in_step'])}",
          f"{fullest['in_step'] / fullest['limit']:.0%} of {gib(fullest['limit'])}", verdict,
          said("nothing pruned", "sec_step", ".1f"), said("pruned", "sec_step", ".1f"), said("pruned", "tokens_s", ",.0f"))


def main():
  rows = [row(path.stem, json.loads(path.read_text())) for path in sorted(PLANS.glob("*.json"))]
  for line in (COLUMNS, ("---",) * len(COLUMNS), *rows):
    print("| " + " | ".join(map(str, line)) + " |")


if __name__ == "__main__":
  main()
