"""One operator in variables in which every input channel has the same size.

    V' = V R,   R = diag sqrt(G_jj / mean),   G' = R^-1 G R^-1 / mean,   and so for P and Q

so that `diag(G') = 1` and `|v'|` says what a weight alone does to the output. The damped objective
of refit, local search and ADMM is

    J(V') = 1/2 ||V X* - W X||^2 / mean + damping / 2 ||V' - W'||^2
          = 1/2 tr(E H E^T) + <E, B> + c,   E = V' - W',   H = G' + damping I,   B = W' P'
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rsprune.reference.statistics import Matrix, Statistics

SMALLEST_ROOT = 1e-2
"""A channel counts as at least this much of the mean one, so that R can be inverted."""


@dataclass(frozen=True)
class Scaled:
    """What solvers see.

    Attributes:
        weight: W' [m, n].
        statistics: G', P' and Q' [n, n].
        roots: the diagonal of R [n].
    """

    weight: Matrix
    statistics: Statistics
    roots: Matrix

    @classmethod
    def of(cls, weight: Matrix, statistics: Statistics, roots: Matrix | None = None) -> Scaled:
        """`weight [m, n]` with the sums of its input.

        Args:
            weight: W [m, n].
            statistics: the sums.
            roots: R of other sums, for held-out tokens; None takes that of these.
        """
        mean = statistics.mean_square
        if roots is None:
            roots = np.maximum(np.sqrt(np.diag(statistics.gram) / mean), SMALLEST_ROOT)
        shrink = mean * np.outer(roots, roots)
        twin = Statistics(len(roots))
        twin.gram = statistics.gram / shrink
        twin.cross, twin.drift = statistics.cross / shrink, statistics.drift / shrink
        twin.tokens = statistics.tokens
        return cls(weight * roots, twin, roots)

    def hessian(self, damping: float) -> Matrix:
        """`H = G' + damping I [n, n]`."""
        return self.statistics.gram + damping * np.eye(len(self.roots))

    @property
    def linear(self) -> Matrix:
        """`B = W' P' [m, n]`, the gradient at `W'`."""
        return self.weight @ self.statistics.cross

    def gradient(self, values: Matrix, damping: float) -> Matrix:
        """`(V' - W') H + B [m, n]` at `values [m, n]`."""
        return (values - self.weight) @ self.hessian(damping) + self.linear

    def objective(self, values: Matrix, damping: float) -> float:
        """`J` at `values [m, n]`, in scaled variables; never negative."""
        moved = values - self.weight
        constant = ((self.weight @ self.statistics.drift) * self.weight).sum()
        square = ((moved @ self.hessian(damping)) * moved).sum()
        return float((square + constant) / 2 + (moved * self.linear).sum())
