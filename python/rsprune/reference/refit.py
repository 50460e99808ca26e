"""Refit: the kept weights solved again on their fixed mask.

    min_V J(V)   subject to   V = 0 outside of the mask          (J: see `scaled.py`)

A row `v` with its mask `S` solves the normal equations `v_S H_SS = (w H - b)_S`. (The core runs
conjugate gradients for at most 20 steps.)
"""

from __future__ import annotations

import numpy as np

from rsprune.reference.pattern import Mask
from rsprune.reference.scaled import Scaled
from rsprune.reference.statistics import Matrix


def refit(problem: Scaled, kept: Mask, damping: float) -> Matrix:
    """The minimiser of `J` on the mask `kept [m, n]`, in scaled variables [m, n].

    Raises:
        LinAlgError: without damping some `G'_SS` may be singular.
    """
    hessian = problem.hessian(damping)
    wanted = problem.weight @ hessian - problem.linear
    values = np.zeros_like(problem.weight)
    for row, mask in enumerate(kept):
        values[row, mask] = np.linalg.solve(hessian[np.ix_(mask, mask)], wanted[row, mask])
    return values
