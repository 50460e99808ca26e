"""Local search over masks by exact minimisation over a few weights at a time (J: see `scaled.py`).

Keep-of groups of up to 70 patterns, group descent: for every group `c` of every row

    v_c = argmin J over v_c with `keep` non-zeros, everything else fixed

by trying all patterns. Ratios and larger groups, swaps: in every unit (a row, or a group) one kept
weight becomes zero and one zero is set to its minimiser, the pair that lowers `J` most, among the
8 kept weights whose loss raises `J` least and the 8 zeros whose return alone lowers it most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rsprune.reference.pattern import Pattern
from rsprune.reference.scaled import Scaled
from rsprune.reference.statistics import Matrix

MOST_PATTERNS = 70
CANDIDATES = 8
NOISE = 1e-5
"""A swap must lower `J` by more than this share of what the return of a weight gains."""


def local_search(
    problem: Scaled, pattern: Pattern, values: Matrix, *, damping: float, sweeps: int = 5
) -> Matrix:
    """Sweeps from `values` until the mask rests, at most `sweeps` of them.

    Args:
        problem: one operator; all its rows stop together (in the core, 98 rows do).
        pattern: what may stay.
        values: a point of the pattern in scaled variables [m, n]; not changed.
        damping: of `J`.
        sweeps: a cap.

    Returns:
        A point of the pattern with no larger `J` [m, n].
    """
    hessian, values = problem.hessian(damping), values.copy()
    for _ in range(sweeps):
        mask = values != 0
        for row, v in enumerate(values):
            linear = problem.linear[row] - problem.weight[row] @ hessian  # J = v H v^T / 2 + ...
            if descends(pattern):
                descend(hessian, linear, v, pattern)
            else:
                swap(hessian, linear, v, pattern)
        if ((values != 0) == mask).all():
            break
    return values


def descends(pattern: Pattern) -> bool:
    """Whether groups are few patterns enough for all of them to be tried."""
    if pattern.group is None:
        return False
    keep, of = pattern.group
    return math.comb(of, keep) <= MOST_PATTERNS


def descend(hessian: Matrix, linear: Matrix, v: Matrix, pattern: Pattern) -> None:
    """One sweep of group descent over the row `v [n]`, in place.

    The group's terms of `J` are `v_c H_cc v_c^T / 2 - h v_c^T` with `h` from everything outside of
    it; on a pattern `S` their minimum is `-1/2 h_S (H_SS)^-1 h_S^T`.
    """
    assert pattern.group is not None
    keep, of = pattern.group
    for start in range(0, len(v), of):
        v[start : start + of] = 0.0
        h = -(v @ hessian + linear)
        best, most = np.arange(start, start + keep), -math.inf
        for places in combinations(range(start, start + of), keep):
            kept = np.array(places)
            gain = h[kept] @ np.linalg.solve(hessian[np.ix_(kept, kept)], h[kept])
            if gain > most:
                best, most = kept, gain
        v[best] = np.linalg.solve(hessian[np.ix_(best, best)], h[best])


def swap(hessian: Matrix, linear: Matrix, v: Matrix, pattern: Pattern) -> None:
    """Swaps in every unit of the row `v [n]`, at most a quarter of its length, in place."""
    length = len(v) if pattern.group is None else pattern.group[1]
    for start in range(0, len(v), length):
        unit = np.arange(start, start + length)
        for _ in range(length // 4):
            change, out, into, value, gain = min(swaps(hessian, linear, v, unit), default=NO_SWAP)
            if change >= -NOISE * gain:
                break
            v[out], v[into] = 0.0, value


NO_SWAP = (0.0, 0, 0, 0.0, 0.0)


def swaps(
    hessian: Matrix, linear: Matrix, v: Matrix, unit: NDArray[np.intp]
) -> Iterator[tuple[float, int, int, float, float]]:
    """All candidates `(change of J, out, into, new v_into, its gain)` in the columns `unit` of `v`.

    `J` changes by `-g_i v_i + H_ii v_i^2 / 2` as `v_i` becomes zero, where `g` is the gradient; as
    `v_j` leaves zero for its minimiser `-g_j / H_jj` it changes by `-g_j^2 / (2 H_jj)`.
    """
    own, g = np.diag(hessian), v @ hessian + linear
    cost = v * (own * v / 2 - g)
    gain = g**2 / (2 * own)
    kept, zeros = unit[v[unit] != 0], unit[v[unit] == 0]
    for out in sorted(kept, key=lambda i: cost[i])[:CANDIDATES]:
        without = g - v[out] * hessian[out]
        for into in sorted(zeros, key=lambda j: -gain[j])[:CANDIDATES]:
            gained = float(without[into] ** 2 / (2 * own[into]))
            value = float(-without[into] / own[into])
            yield float(cost[out]) - gained, int(out), int(into), value, gained
