"""FISTA-plus (ours, after FISTAPruner, arXiv 2408.03728), in scaled variables (see `scaled.py`).

    F(V) = 1/2 ||V X* - W X||^2 + lambda sum |v_ij|

What it adds to `fista.py`: the scaling, the restart of every row's momentum where it points uphill,
a refit of every rounded point before it is judged, and the held-out score that judges it.
"""

from __future__ import annotations

import math

import numpy as np

from rsprune.reference.certificate import quadratic_error
from rsprune.reference.fista import (
    LARGEST,
    RESOLUTION,
    SMALLEST,
    FistaPoint,
    next_lambda,
    rounding_error,
)
from rsprune.reference.pattern import Pattern
from rsprune.reference.polish import polish
from rsprune.reference.refit import refit
from rsprune.reference.scaled import Scaled
from rsprune.reference.scores import magnitude
from rsprune.reference.sparsegpt import sparsegpt
from rsprune.reference.statistics import Matrix, Statistics


def fista_plus(
    weight: Matrix,
    pattern: Pattern,
    statistics: Statistics,
    heldout: Statistics | None,
    *,
    iterations: int = 20,
    xi: float = 0.3,
    patience: int = 3,
    max_rounds: int = 12,
    lambda_start: float = 0.05,
    damping: float = 0.01,
    refit_steps: int | None = 8,
    polish_steps: int | None = 20,
    lipschitz: float | None = None,
) -> FistaPoint:
    """Rounds from the best refitted point until `patience` of them bring no gain; polished.

    The core can run the published method as well (`floor`); this twin leaves that out.

    Args:
        weight: W [m, n].
        pattern: what may stay.
        statistics: sums of its input over the calibration tokens.
        heldout: the same over the held-out tokens, which judge; None lets the calibration judge.
        iterations: FISTA iterations a round.
        xi: share of the error that rounding may cause before lambda rises.
        patience: rounds without gain.
        max_rounds: a cap on rounds.
        lambda_start: the first lambda, in units of the scaled weights' rms.
        damping: of the SparseGPT start and of the refits.
        refit_steps: of the refit inside of a round; None is exact.
        polish_steps: of the refits at the end.
        lipschitz: what the step is the inverse of; None takes the largest eigenvalue of G'.
    """
    problem, judge = Scaled.of(weight, statistics), heldout or statistics
    sums = problem.statistics

    def score(scaled: Matrix) -> float:
        return quadratic_error(scaled / problem.roots, weight, judge)

    def refitted(values: Matrix) -> tuple[Matrix, float]:
        scaled = refit(problem, values, damping, refit_steps)
        return scaled, score(scaled)

    relative = damping / sums.mean_square  # less than one where channels are dead
    start = sparsegpt(problem.weight, pattern, sums, damping=relative)
    best, best_score = refitted(start)
    if score(start) <= best_score:
        best, best_score = start, score(start)
    if lipschitz is None:
        lipschitz = float(np.linalg.eigvalsh(sums.gram)[-1])
    rms = math.sqrt((problem.weight**2).mean())
    lambda_, low, high, best_lambda = lambda_start, 0.0, math.inf, 0.0
    rounds = stale = 0
    while lipschitz > 0 and stale < patience and rounds < max_rounds:
        point = minimise(best, problem, lambda_ * rms, lipschitz, iterations)
        rounded = magnitude(point, pattern)
        rounding = rounding_error(point, rounded, problem.weight, sums)
        raise_lambda = rounding > xi * quadratic_error(rounded, problem.weight, sums)
        candidate, judged = refitted(rounded)
        rounds, stale = rounds + 1, stale + 1
        if judged < best_score:
            best, best_score, best_lambda, stale = candidate, judged, lambda_, 0
        low, high = (lambda_, high) if raise_lambda else (low, lambda_)
        lambda_ = next_lambda(low, high)
        if high < low * (1 + RESOLUTION) or not SMALLEST <= lambda_ < LARGEST:
            break
    unscaled = best / problem.roots
    values = polish(weight, pattern, statistics, heldout, unscaled, steps=polish_steps).values
    return FistaPoint(values, quadratic_error(values, weight, statistics), rounds, best_lambda)


def minimise(
    start: Matrix, problem: Scaled, penalty: float, lipschitz: float, iterations: int
) -> Matrix:
    """`iterations` steps of FISTA on `F` [m, n], every row with a momentum of its own.

    `t` of a row goes back to one, and `y` to `x`, where `<y_k - x_k+1, x_k+1 - x_k> > 0`
    (O'Donoghue and Candes 2012, the gradient scheme).
    """
    x, y = start, start
    t = np.ones((len(start), 1))
    for _ in range(iterations):
        u = y - problem.gradient(y, 0.0) / lipschitz
        new = np.sign(u) * np.maximum(np.abs(u) - penalty / lipschitz, 0.0)
        travel = new - x
        uphill = ((y - new) * travel).sum(axis=1, keepdims=True) > 0
        t_next = (1 + np.sqrt(1 + 4 * t * t)) / 2
        y = new + np.where(uphill, 0.0, (t - 1) / t_next) * travel
        x, t = new, np.where(uphill, 1.0, t_next)
    return x
