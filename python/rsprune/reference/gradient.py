"""Twin of the core's sizes of a weight gradient: the gradient is made as a whole."""

from __future__ import annotations

import numpy as np

from rsprune.reference.statistics import Matrix


def gradient_sizes(deltas: Matrix, inputs: Matrix, weight: Matrix) -> tuple[float, float, float]:
    """`sum |G|`, `sum G^2` and `sum |w o G|` of `G = D^T A`.

    Args:
        deltas: `D [T, m]`, output gradients of a linear.
        inputs: `A [T, n]`, its inputs.
        weight: `w [m, n]`.
    """
    gradient = np.asarray(deltas, np.float64).T @ np.asarray(inputs, np.float64)
    of_weight = np.abs(np.asarray(weight, np.float64) * gradient)
    return float(np.abs(gradient).sum()), float((gradient**2).sum()), float(of_weight.sum())


def gradient_squares(deltas: Matrix, inputs: Matrix) -> float:
    """`sum G^2` without any entry of `G`: `sum_st (d_s . d_t)(a_s . a_t)`."""
    d, a = np.asarray(deltas, np.float64), np.asarray(inputs, np.float64)
    return float(((d @ d.T) * (a @ a.T)).sum())
