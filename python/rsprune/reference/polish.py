"""What may follow any method: a refit and a local search, each kept only where the score falls.

    for damping in 0.01, 0.03, 0.1, 0.3, while the score falls:  candidate = refit of the start
    candidate = refit of a local search from the best of them

The score is the relative error on held-out tokens, on the calibration tokens where there are none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rsprune.reference.certificate import quadratic_error
from rsprune.reference.local_search import local_search
from rsprune.reference.pattern import Pattern
from rsprune.reference.refit import refit as solve_again
from rsprune.reference.scaled import Scaled
from rsprune.reference.statistics import Matrix, Statistics

LADDER = (0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Polished:
    """What `polish` found: V [m, n], its score, and what was kept (None: nothing to keep)."""

    values: Matrix
    score: float
    damping: float | None
    search: bool | None


def polish(
    weight: Matrix,
    pattern: Pattern,
    statistics: Statistics,
    heldout: Statistics | None,
    values: Matrix,
    *,
    refit: bool = True,
    search: bool = True,
    steps: int | None = None,
) -> Polished:
    """Polishes `values [m, n]`, which are in the pattern.

    Args:
        weight: W [m, n].
        pattern: what may stay.
        statistics: sums of its input over the calibration tokens.
        heldout: the same over the held-out tokens.
        values: the start.
        refit: whether kept weights are solved again.
        search: whether the mask may change.
        steps: of a refit; None is exact.
    """
    problem, judge = Scaled.of(weight, statistics), heldout or statistics

    def score(scaled: Matrix) -> float:
        return quadratic_error(scaled / problem.roots, weight, judge)

    start = values * problem.roots
    best = Polished(start, score(start), None, None)
    candidate, below = start, math.inf
    for rung, damping in enumerate(LADDER if refit else ()):
        shorter = steps if steps is None or rung == 0 else -(-steps // 2)
        candidate = solve_again(problem, candidate, damping, shorter)
        if score(candidate) < best.score:
            best = Polished(candidate, score(candidate), damping, None)
        if score(candidate) > below:
            break
        below = score(candidate)
    if search:
        damping = best.damping or LADDER[0]
        candidate = local_search(problem, pattern, best.values, damping=damping)
        if refit:
            candidate = solve_again(problem, candidate, damping, steps)
        kept = score(candidate) < best.score
        chosen = candidate if kept else best.values
        best = Polished(chosen, min(score(candidate), best.score), best.damping, kept)
    return Polished(best.values / problem.roots, best.score, best.damping, best.search)
