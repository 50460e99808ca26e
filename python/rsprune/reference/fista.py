"""FISTAPruner (arXiv 2408.03728): l1 relaxation, rounding, adaptive lambda.

    F(V) = 1/2 ||V X* - W X||^2 + lambda sum |v_ij|

All sums are divided by `mean(diag G)`, and lambda is in units of `rms(W)`, as in the core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rsprune.reference.certificate import quadratic_error
from rsprune.reference.pattern import Pattern
from rsprune.reference.scores import magnitude, wanda
from rsprune.reference.sparsegpt import sparsegpt
from rsprune.reference.statistics import Matrix, Statistics

SMALLEST, LARGEST = 1e-6, 1e6
RESOLUTION = 1e-3


@dataclass(frozen=True)
class FistaPoint:
    """What `fista` found: V [m, n], its relative error, and how it got there."""

    values: Matrix
    error: float
    rounds: int
    lambda_: float


def fista(
    weight: Matrix,
    pattern: Pattern,
    statistics: Statistics,
    *,
    warm_start: Literal["wanda", "sparsegpt"] = "wanda",
    iterations: int = 20,
    xi: float = 0.3,
    patience: int = 3,
    max_rounds: int = 40,
    lambda_start: float = 0.01,
    damping: float = 0.01,
    lipschitz: float | None = None,
) -> FistaPoint:
    """Rounds of FISTA from the best rounded point until `patience` of them bring no gain.

    Args:
        weight: W [m, n].
        pattern: what may stay.
        statistics: sums of its input.
        warm_start: where the first round starts.
        iterations: FISTA iterations a round.
        xi: share of the error that rounding may cause before lambda rises.
        patience: rounds without gain, counted once lambda is bracketed.
        max_rounds: a cap on rounds.
        lambda_start: the first lambda.
        damping: of a SparseGPT start.
        lipschitz: what the step is the inverse of, in units of `mean(diag G)`; None takes the
            largest eigenvalue of G.
    """
    if warm_start == "wanda":
        best = wanda(weight, pattern, statistics)
    else:
        best = sparsegpt(weight, pattern, statistics, damping=damping)
    if lipschitz is None:
        lipschitz = float(np.linalg.eigvalsh(statistics.gram)[-1]) / statistics.mean_square
    rms = math.sqrt((weight**2).mean())
    best_error, best_lambda = quadratic_error(best, weight, statistics), 0.0
    lambda_, low, high = lambda_start, 0.0, math.inf
    rounds = stale = 0
    while lipschitz > 0 and stale < patience and rounds < max_rounds:
        point = minimise(best, weight, statistics, lambda_ * rms, lipschitz, iterations)
        rounded = magnitude(point, pattern)
        error = quadratic_error(rounded, weight, statistics)
        rounds += 1
        stale += low > 0 and high < math.inf
        if error < best_error:
            best, best_error, best_lambda, stale = rounded, error, lambda_, 0
        if rounding_error(point, rounded, weight, statistics) > xi * error:
            low = lambda_
        else:
            high = lambda_
        lambda_ = next_lambda(low, high)
        if high < low * (1 + RESOLUTION) or not SMALLEST <= lambda_ < LARGEST:
            break
    return FistaPoint(best, best_error, rounds, best_lambda)


def minimise(
    start: Matrix,
    weight: Matrix,
    statistics: Statistics,
    penalty: float,
    lipschitz: float,
    iterations: int,
) -> Matrix:
    """`iterations` steps of FISTA (Beck and Teboulle 2009, section 4) on `F`; returns [m, n].

    `x_k = prox(y_k - grad f(y_k) / L)`, `t_k+1 = (1 + sqrt(1 + 4 t_k^2)) / 2`,
    `y_k+1 = x_k + (t_k - 1) / t_k+1 (x_k - x_k-1)`.
    """
    gram = statistics.gram / statistics.mean_square
    linear = weight @ statistics.target_cross / statistics.mean_square
    x, y, t = start, start, 1.0
    for _ in range(iterations):
        u = y - (y @ gram - linear) / lipschitz
        new = np.sign(u) * np.maximum(np.abs(u) - penalty / lipschitz, 0.0)
        t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
        x, y, t = new, new + (t - 1) / t_next * (new - x), t_next
    return x


def rounding_error(point: Matrix, rounded: Matrix, weight: Matrix, statistics: Statistics) -> float:
    """`||(V - R) X*||^2 / ||W X||^2`: what rounding `point` to `rounded` changes."""
    moved = point - rounded
    energy = ((weight @ statistics.dense_gram) * weight).sum()
    return float(((moved @ statistics.gram) * moved).sum() / energy) if energy > 0 else 0.0


def next_lambda(low: float, high: float) -> float:
    """Between `low` (rounding hurts too much) and `high`; by factors of two until both exist."""
    if high == math.inf:
        return low * 2
    return high / 2 if low == 0 else math.sqrt(low * high)
