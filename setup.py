"""Adds what lies beside the package in the repository: configs/ and the quickstart's model and data. The rest: pyproject.toml."""

from setuptools import find_namespace_packages, setup

BESIDE = {"arrol_jax.configs": "configs", "arrol_jax.arithmetic": "experiments/arithmetic"}

setup(packages=[*find_namespace_packages(include=["arrol_jax", "arrol_jax.*"]), *BESIDE], package_dir=BESIDE,
      package_data={"arrol_jax.arithmetic": ["*", "*/*"], "arrol_jax.benchmarks": ["*.json"],
                    "arrol_jax.reporting": ["page.css", "page.js"]})
