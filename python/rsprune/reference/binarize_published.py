"""The published binarizing methods and GPTQ, as far as they are known, in float64.

See the core's `binarize/` for what is published and what is reconstructed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsprune.reference.binarize import reversed_cholesky, sweep
from rsprune.reference.statistics import Matrix, Statistics
from rsprune.reference.storage import narrow, widen

BLOCK = 128
SALIENT = (0, 1, 2, 4, 8, 16, 32)
SPLITS = tuple(k / 10 for k in range(1, 10))
Bits = NDArray[np.bool_]


def half(values: Matrix) -> Matrix:
    """As F16 stores them."""
    return np.asarray(widen(narrow(values, "F16"), "F16"), np.float64)


def stored(values: Matrix, dtype: str) -> Matrix:
    """As `dtype` stores what is exact in float32."""
    return np.asarray(widen(narrow(values.astype(np.float32), dtype), dtype), np.float64)


@dataclass
class Division:
    """Salient columns [w] and, of the others, which weights [m, w] are of the second group."""

    salient: Bits
    second: Bits

    @classmethod
    def of(cls, targets: Matrix, diagonal: Matrix) -> Division:
        """The division of least squared error among the candidates."""
        w = targets.shape[1]
        order = np.argsort(-(targets**2).sum(0) * diagonal**2, kind="stable")
        largest = np.abs(targets).max()
        plain = np.zeros(targets.shape, bool)
        counts = [c for c in SALIENT if c < w]
        tried = [cls(np.isin(np.arange(w), order[:c]), plain) for c in counts]
        best = min(tried, key=lambda d: d.error(targets))
        splits = [cls(best.salient, np.abs(targets) > s * largest) for s in SPLITS]
        return min([best, *splits], key=lambda d: d.error(targets))

    def error(self, targets: Matrix) -> float:
        """Squared error of the plain binarization."""
        values = [Row.plain(t, self, i).values() for i, t in enumerate(targets)]
        return float(((targets - np.array(values)) ** 2).sum())

    def parts(self, row: int) -> list[Bits]:
        """First group, second group, salient columns of a row [w] each."""
        return [~self.salient & ~self.second[row], ~self.salient & self.second[row], self.salient]


@dataclass
class Row:
    """`V = sum_k theta_k phi_k`: mean and signs of every part, residual signs of salient ones."""

    theta: Matrix
    phi: Matrix

    @classmethod
    def plain(cls, wanted: Matrix, division: Division, row: int) -> Row:
        """Means, mean deviations, and what is left of salient columns once more."""
        theta, phi = np.zeros(7), np.zeros((7, len(wanted)))
        for p, part in enumerate(division.parts(row)):
            if part.any():
                theta[2 * p] = wanted[part].mean()
                theta[2 * p + 1] = np.abs(wanted[part] - theta[2 * p]).mean()
            phi[2 * p] = part
            phi[2 * p + 1] = part * np.where(wanted < theta[2 * p], -1.0, 1.0)
        left = (wanted - theta @ phi)[division.salient]
        if left.size:
            theta[6] = np.abs(left).mean()
            phi[6, division.salient] = np.where(left < 0, -1.0, 1.0)
        return cls(theta, phi)

    def values(self) -> Matrix:
        """V [w]."""
        return np.asarray(self.theta @ self.phi, np.float64)

    def closed_forms(self, wanted: Matrix, metric: Matrix, rounds: int) -> None:
        """Every theta by its closed form with the others fixed, again and again."""
        for _ in range(rounds):
            for k, phi in enumerate(self.phi):
                energy = phi @ metric @ phi
                if energy > 0:
                    others = self.values() - self.theta[k] * phi
                    self.theta[k] = (wanted - others) @ metric @ phi / energy


def billm(weight: Matrix, statistics: Statistics, *, damping: float, dtype: str) -> Matrix:
    """BiLLM of `weight [m, n]`, as `dtype` stores it."""

    def solve(block: slice, targets: Matrix, metric: Matrix, diagonal: Matrix) -> Matrix:
        division = Division.of(targets, diagonal)
        rows = [Row.plain(t, division, i) for i, t in enumerate(targets)]
        return stored(np.array([half(row.theta) @ row.phi for row in rows]), dtype)

    return sweep(weight, statistics, solve, width=BLOCK, damping=damping, published=True)


def pbs2p(
    weight: Matrix,
    statistics: Statistics,
    *,
    keep: int,
    of: int,
    damping: float,
    dtype: str,
    rounds: int = 8,
) -> Matrix:
    """PBS2P of `weight [m, n]`, as `dtype` stores it."""

    def spbo(wanted: Matrix, row: Row, metric: Matrix, diagonal: Matrix) -> Matrix:
        row.closed_forms(wanted, metric, rounds)
        groups = [range(first, first + of) for first in range(0, len(wanted), of)]
        order = [sorted(group, key=lambda j: abs(wanted[j] * diagonal[j])) for group in groups]
        for step in range(of - keep):
            row.phi[:, [ranked[step] for ranked in order]] = 0
            row.closed_forms(wanted, metric, rounds)
        return half(row.theta) @ row.phi

    def solve(block: slice, targets: Matrix, metric: Matrix, diagonal: Matrix) -> Matrix:
        division = Division.of(targets, diagonal)
        rows = [Row.plain(t, division, i) for i, t in enumerate(targets)]
        pairs = zip(targets, rows, strict=True)
        return stored(np.array([spbo(t, row, metric, diagonal) for t, row in pairs]), dtype)

    return sweep(weight, statistics, solve, width=BLOCK, damping=damping, published=True)


def arb(
    weight: Matrix, statistics: Statistics, *, damping: float, dtype: str, rounds: int = 15
) -> Matrix:
    """ARB-LLM's row-column form of `weight [m, n]`, as `dtype` stores it."""

    def solve(block: slice, targets: Matrix, metric: Matrix, diagonal: Matrix) -> Matrix:
        size, columns = np.abs(targets), np.ones(targets.shape[1])
        for _ in range(rounds):
            rows = size @ columns / (columns @ columns)
            columns = rows @ size
            columns = columns / columns.mean() if columns.any() else np.ones_like(columns)
        columns = half(columns)
        rows = half(size @ columns / (columns @ columns))
        return stored(np.outer(rows, columns) * np.where(targets < 0, -1.0, 1.0), dtype)

    return sweep(weight, statistics, solve, width=BLOCK, damping=damping, published=True)


def gptq(
    weight: Matrix, statistics: Statistics, *, damping: float, dtype: str, bits: int
) -> Matrix:
    """GPTQ of `weight [m, n]` in groups of 128 columns, as `dtype` stores it."""
    largest = 2**bits - 1

    def solve(block: slice, targets: Matrix, metric: Matrix, diagonal: Matrix) -> Matrix:
        low, high = np.minimum(targets.min(1), 0), np.maximum(targets.max(1), 0)
        scale = half((high - low) / largest)
        safe = np.where(scale > 0, scale, 1)
        zero = np.clip(np.floor(-low / safe + 0.5), 0, largest) * (scale > 0)
        r, values = reversed_cholesky(metric), np.zeros_like(targets)
        for j in range(targets.shape[1]):
            lost = (targets - values)[:, :j] @ r[:j, j]
            level = (targets[:, j] + lost / r[j, j]) / safe
            nearest = np.sign(level) * np.floor(np.abs(level) + 0.5)
            code = np.where(scale > 0, np.clip(nearest + zero, 0, largest), zero)
            values[:, j] = stored((code - zero) * scale, dtype)
        return values

    return sweep(weight, statistics, solve, width=BLOCK, damping=damping, published=False)
