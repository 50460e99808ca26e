"""ADMM with a growing penalty (ALPS, arXiv 2406.07831), in scaled variables (see `scaled.py`).

    min_{V, Z} J(V)   subject to   V = Z,   Z in the pattern

    V = argmin_V J(V) + <U, V> + rho/2 ||V - Z||^2 = W + (rho (Z - W) - U - B)(H + rho I)^-1
    Z = P(V + U / rho)
    U = U + rho (V - Z)

Every three iterations: the end if the support has not changed, else rho grows, by more the more of
the kept weights are others. A refit on the support follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rsprune.reference.pattern import Pattern
from rsprune.reference.refit import refit
from rsprune.reference.scaled import Scaled
from rsprune.reference.scores import magnitude
from rsprune.reference.statistics import Matrix, Statistics

STEPS_A_RHO = 3
PUBLISHED = (0.1, (1.3, 1.2, 1.1))
"""First rho; its growth where at least 10 %, at least 0.5 %, or fewer of the kept are others."""
SLOW = (0.03, (1.1, 1.07, 1.05))
"""Our own, with about twice the iterations."""


@dataclass(frozen=True)
class AdmmPoint:
    """What `admm` found: V [m, n], and the iterations it took."""

    values: Matrix
    iterations: int


def admm(
    weight: Matrix,
    pattern: Pattern,
    statistics: Statistics,
    *,
    damping: float = 0.01,
    slow: bool = False,
    max_iterations: int = 300,
) -> AdmmPoint:
    """The splitting from `Z = W`, `U = 0`, then a refit on the support of `Z`.

    Args:
        weight: W [m, n].
        pattern: what may stay.
        statistics: sums of its input.
        damping: of `J`.
        slow: the schedule of rho.
        max_iterations: a cap.
    """
    problem = Scaled.of(weight, statistics)
    rho, growth = SLOW if slow else PUBLISHED
    z, u = problem.weight.copy(), np.zeros_like(problem.weight)
    iterations = 0
    while iterations < max_iterations:
        inverse = np.linalg.inv(problem.hessian(damping + rho))
        before = z != 0
        for _ in range(STEPS_A_RHO):
            pulled = rho * (z - problem.weight) - u - problem.linear
            v = problem.weight + pulled @ inverse
            z = magnitude(v + u / rho, pattern)
            u = u + rho * (v - z)
        iterations += STEPS_A_RHO
        others = int(((z != 0) != before).sum()) / max(int((z != 0).sum()), 1)
        if others == 0:
            break
        rho *= growth[0] if others >= 0.1 else growth[1] if others >= 0.005 else growth[2]
    return AdmmPoint(refit(problem, z, damping) / problem.roots, iterations)
