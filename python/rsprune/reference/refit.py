"""Refit: the kept weights solved again on their fixed mask.

    min_V J(V)   subject to   V = 0 outside of the mask          (J: see `scaled.py`)

A row `v` with its mask `S` solves the normal equations `v_S H_SS = (w H - b)_S`.
"""

from __future__ import annotations

import numpy as np

from rsprune.reference.scaled import Scaled
from rsprune.reference.statistics import Matrix

TOLERANCE = 1e-10
"""Squared residuals below this share of the first ones count as zero."""


def refit(problem: Scaled, values: Matrix, damping: float, steps: int | None = None) -> Matrix:
    """The minimiser of `J` on the mask of `values`.

    Args:
        problem: one operator.
        values: a point in scaled variables [m, n]; its non-zeros are the mask.
        damping: of `J`.
        steps: of conjugate gradients from `values`, as the core takes them; None is exact.

    Returns:
        The minimiser in scaled variables [m, n].

    Raises:
        LinAlgError: without damping some `G'_SS` may be singular.
    """
    hessian = problem.hessian(damping)
    wanted = problem.weight @ hessian - problem.linear
    fitted = np.zeros_like(values)
    for row, start in enumerate(values):
        kept = start != 0
        matrix, right = hessian[np.ix_(kept, kept)], wanted[row, kept]
        if steps is None:
            fitted[row, kept] = np.linalg.solve(matrix, right)
        else:
            fitted[row, kept] = conjugate_gradients(matrix, right, start[kept], steps)
    return fitted


def conjugate_gradients(matrix: Matrix, right: Matrix, start: Matrix, steps: int) -> Matrix:
    """At most `steps` steps towards the solution `x` of `x matrix = right` [k]."""
    x, residual = start, right - start @ matrix
    direction = residual
    first = square = float(residual @ residual)
    for _ in range(steps):
        if square <= TOLERANCE * first:
            break
        image = direction @ matrix
        length = square / (direction @ image)
        x, residual = x + length * direction, residual - length * image
        before, square = square, float(residual @ residual)
        direction = residual + square / before * direction
    return x
