"""Rewards: find a response's final answer and decide whether it is right. Pure Python, imports no JAX.

extract.py finds the answer's text, grade.py decides, pool.py runs what cannot be bounded in processes that
can be killed.
"""

from arrol_jax.rewards.extract import extract_answer
from arrol_jax.rewards.grade import Graded, grade
from arrol_jax.rewards.pool import Grader, Pending

__all__ = ["Graded", "Grader", "Pending", "extract_answer", "grade"]
