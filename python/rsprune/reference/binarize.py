"""The sweep of the binarizing methods, and `pbs2p-exact`, row by row in float64.

H = R R^T, R upper;   E = T - V
exact compensation       T_b + F_b,  F_b = (sum_{a<b} E_a R_ab) R_bb^-1,   metric R_bb R_bb^T
published compensation   T_later -= (E_b / diag U_bb) U_b,later,  U = R^-1,    metric H_bb
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from rsprune.reference.sparsegpt import damped, target
from rsprune.reference.statistics import Matrix, Statistics
from rsprune.reference.storage import narrow, widen

SCALE_COLUMNS = 256
Solve = Callable[[slice, Matrix, Matrix, Matrix], Matrix]
"""Block, its targets [m, w], its metric [w, w] and diag(R) [w] -> its values [m, w]."""


def reversed_cholesky(hessian: Matrix) -> Matrix:
    """Upper triangular `R [n, n]` with `R R^T = H`."""
    return np.asarray(np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1], np.float64)


def sweep(
    weight: Matrix,
    statistics: Statistics,
    solve: Solve,
    *,
    width: int,
    damping: float,
    published: bool,
) -> Matrix:
    """Runs `solve` over blocks of `width` columns of `weight [m, n]`; returns V [m, n]."""
    hessian = damped(statistics, damping)
    wanted, r = target(weight, statistics, damping), reversed_cholesky(hessian)
    upper, values, now = np.linalg.inv(r), np.zeros_like(wanted), wanted.copy()
    for start in range(0, weight.shape[1], width):
        block = slice(start, min(start + width, weight.shape[1]))
        own = r[block, block]
        if published:
            metric = hessian[block, block]
        else:
            lost = (wanted - values)[:, :start] @ r[:start, block]
            now[:, block] = wanted[:, block] + lost @ np.linalg.inv(own)
            metric = own @ own.T
        values[:, block] = solve(block, now[:, block], metric, np.diag(own))
        if published:
            errors = (now - values)[:, block] * np.diag(own)
            now[:, block.stop :] -= errors @ upper[block, block.stop :]
    return values


def exact(
    weight: Matrix,
    statistics: Statistics,
    *,
    keep: int,
    of: int,
    damping: float,
    dtype: str,
    stage: str = "search",
) -> Matrix:
    """`pbs2p-exact` of `weight [m, n]` as `dtype` stores it; see the core's `exact.rs`."""

    def solve(block: slice, targets: Matrix, metric: Matrix, diagonal: Matrix) -> Matrix:
        rows = [_row(t, metric, diagonal, keep, of, stage) for t in targets]
        scales = np.array([alpha for alpha, _ in rows])[:, None]
        codes = np.array([code for _, code in rows], np.float64)
        return np.asarray(rounded(scales, dtype) * codes, np.float64)

    return sweep(
        weight, statistics, solve, width=SCALE_COLUMNS, damping=damping, published=stage == "static"
    )


def residual(
    weight: Matrix, statistics: Statistics, *, keep: int, of: int, damping: float, dtype: str
) -> Matrix:
    """Two planes of signs, the second `keep` of every `of`; see the core's `residual.rs`."""

    def solve(block: slice, targets: Matrix, metric: Matrix, diagonal: Matrix) -> Matrix:
        rows = [_two_planes(t, metric, diagonal, keep, of) for t in targets]
        return np.asarray(widen(narrow(np.array(rows, np.float32), dtype), dtype), np.float64)

    return sweep(weight, statistics, solve, width=SCALE_COLUMNS, damping=damping, published=False)


def _two_planes(wanted: Matrix, metric: Matrix, diagonal: Matrix, keep: int, of: int) -> Matrix:
    """The best sum of two planes among four steps, with scales in F16."""
    groups = [(8, 8), (keep, of)]
    codes, scales = [np.zeros_like(wanted)] * 2, [0.0, 0.0]
    best, least = np.zeros_like(wanted), np.inf
    for step in range(4):
        plane = step % 2
        left = wanted - scales[1 - plane] * codes[1 - plane]
        codes[plane] = _row(left, metric, diagonal, *groups[plane], "search")[1]
        scales = _two_scales(wanted, metric, codes[0], codes[1])
        scales = widen(narrow(np.array(scales, np.float32), "F16"), "F16").tolist()
        value = scales[0] * codes[0] + scales[1] * codes[1]
        error = wanted - value
        if (found := float(error @ metric @ error)) < least:
            best, least = value, found
    return best


def _two_scales(wanted: Matrix, metric: Matrix, first: Matrix, second: Matrix) -> list[float]:
    """Scales of least objective, none below zero."""
    codes = np.stack([first, second])
    energy, pull = codes @ metric @ codes.T, codes @ metric @ wanted
    if np.linalg.det(energy) <= 1e-9 * energy[0, 0] * energy[1, 1]:
        return [float(pull[0] / energy[0, 0]) if energy[0, 0] > 0 else 0.0, 0.0]
    alpha, beta = np.linalg.solve(energy, pull)
    if beta < 0:
        alpha, beta = pull[0] / energy[0, 0], 0.0
    if alpha < 0:
        alpha, beta = 0.0, max(float(pull[1] / energy[1, 1]), 0.0)
    return [float(alpha), float(beta)]


def rounded(scales: Matrix, dtype: str) -> Matrix:
    """Scales in F16, then in the weight's type."""
    half = widen(narrow(np.maximum(scales, 0), "F16"), "F16")
    return np.asarray(widen(narrow(half, dtype), dtype), np.float64)


def best_scale(wanted: Matrix, code: Matrix, metric: Matrix) -> float:
    """The alpha of least `(T - alpha c) G (T - alpha c)^T`."""
    energy = code @ metric @ code
    return float(wanted @ metric @ code / energy) if energy > 0 else 0.0


def _row(
    wanted: Matrix, metric: Matrix, diagonal: Matrix, keep: int, of: int, stage: str
) -> tuple[float, Matrix]:
    alpha, code = _scaled(wanted, np.where(wanted < 0, -1.0, 1.0), metric)
    groups = [range(first, first + of) for first in range(0, len(code), of)]
    if stage in ("static", "compensated"):
        for group in groups:
            scores = [(abs(wanted[j] * diagonal[j]), j) for j in group]
            for _, j in sorted(scores)[: of - keep]:
                code[j] = 0
        return _scaled(wanted, code, metric)
    for _ in range(keep, of):
        for group in groups:
            code[_least(wanted, code, metric, alpha, group)] = 0
        alpha, code = _scaled(wanted, code, metric)
    if stage == "search" and alpha > 0:
        for group in groups:
            code[group] = _best_code(wanted, code, metric, alpha, group, keep)
        alpha, code = _scaled(wanted, code, metric)
    return alpha, code


def _scaled(wanted: Matrix, code: Matrix, metric: Matrix) -> tuple[float, Matrix]:
    """The best scale, and the code; the opposite code where the scale would be below zero."""
    alpha = best_scale(wanted, code, metric)
    return (-alpha, -code) if alpha < 0 else (alpha, code)


def _objective(wanted: Matrix, code: Matrix, metric: Matrix, alpha: float) -> float:
    error = wanted - alpha * code
    return float(error @ metric @ error)


def _least(wanted: Matrix, code: Matrix, metric: Matrix, alpha: float, group: range) -> int:
    """The kept column of a group without which the objective is least."""

    def without(j: int) -> float:
        tried = code.copy()
        tried[j] = 0
        return _objective(wanted, tried, metric, alpha)

    return min((j for j in group if code[j]), key=without)


def _best_code(
    wanted: Matrix, code: Matrix, metric: Matrix, alpha: float, group: range, keep: int
) -> Matrix:
    """All codes of a group tried out."""
    best, least = code[group], np.inf
    for places in itertools.combinations(group, keep):
        for signs in itertools.product((1.0, -1.0), repeat=keep):
            tried = code.copy()
            tried[group] = 0
            tried[list(places)] = signs
            if (found := _objective(wanted, tried, metric, alpha)) < least:
                best, least = tried[group], found
    return best
