"""Methods that choose a mask by a score and leave the kept weights as they are."""

from __future__ import annotations

import numpy as np

from rsprune.reference.pattern import Pattern
from rsprune.reference.statistics import Matrix, Statistics


def magnitude(weight: Matrix, pattern: Pattern) -> Matrix:
    """Keeps the largest `|w|` of `weight [m, n]`."""
    return np.where(pattern.mask(np.abs(weight)), 0.0, weight)


def wanda(weight: Matrix, pattern: Pattern, statistics: Statistics) -> Matrix:
    """Keeps the largest `|w_ij| ||x_j||` of `weight [m, n]` (arXiv 2306.11695, equation 1)."""
    norms = np.sqrt(np.diag(statistics.gram))
    return np.where(pattern.mask(np.abs(weight) * norms), 0.0, weight)
