"""The relative output error of a pruned operator, from activations and from their sums."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from rsprune.reference.statistics import Matrix, Statistics


def relative_error(
    values: ArrayLike, weight: ArrayLike, x: ArrayLike, dense: ArrayLike | None = None
) -> float:
    """`||V X* - W X||^2 / ||W X||^2`, straight from the activations.

    Args:
        values: the pruned weight V [m, n].
        weight: the dense weight W [m, n].
        x: inputs X* in the compressed model [tokens, n].
        dense: inputs X in the dense model [tokens, n]; None where they are the same.
    """
    own = np.asarray(x, np.float64)
    inputs = own if dense is None else np.asarray(dense, np.float64)
    wanted = inputs @ np.asarray(weight, np.float64).T
    found = own @ np.asarray(values, np.float64).T
    return _ratio(float(((found - wanted) ** 2).sum()), float((wanted**2).sum()))


def quadratic_error(values: Matrix, weight: Matrix, statistics: Statistics) -> float:
    """The same from sums over tokens alone, for when the activations are gone.

    `||V X* - W X||^2 = tr(D G D^T) + 2 tr(D P^T W^T) + tr(W Q W^T)` with `D = V - W`.
    """
    moved = values - weight
    error = ((moved @ statistics.gram) * moved).sum()
    error += 2 * ((weight @ statistics.cross) * moved).sum()
    error += ((weight @ statistics.drift) * weight).sum()
    energy = ((weight @ statistics.dense_gram) * weight).sum()
    return _ratio(max(float(error), 0.0), float(energy))


def _ratio(error: float, energy: float) -> float:
    """An operator without input has no error."""
    return error / energy if energy > 0 else 0.0
