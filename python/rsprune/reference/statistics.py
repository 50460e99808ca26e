"""The sums over calibration tokens that a layer problem needs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


class Statistics:
    """Sums over tokens of one input of `width` channels.

    With `x` the inputs in the dense model and `x*` those in the compressed one:

        gram  G = sum x* x*^T      cross P = sum (x* - x) x*^T      drift Q = sum (x* - x)(x* - x)^T

    Attributes:
        gram: [width, width].
        cross: [width, width]; zero where both inputs agree.
        drift: [width, width]; zero where both inputs agree.
        tokens: how many were added.
    """

    def __init__(self, width: int) -> None:
        self.gram, self.cross, self.drift = (np.zeros((width, width)) for _ in range(3))
        self.tokens = 0

    def add(self, x: ArrayLike, dense: ArrayLike | None = None) -> None:
        """Adds inputs `x* [tokens, width]` and those of the dense model for the same tokens."""
        own = np.asarray(x, np.float64)
        moved = own - (own if dense is None else np.asarray(dense, np.float64))
        self.gram += own.T @ own
        self.cross += moved.T @ own
        self.drift += moved.T @ moved
        self.tokens += len(own)

    @classmethod
    def of(cls, sums: Any) -> Statistics:
        """A copy of the sums that a `_core.Statistics` holds."""
        twin = cls(sums.width)
        twin.gram, twin.tokens = sums.gram(), sums.tokens
        if sums.cross() is not None:
            twin.cross, twin.drift = sums.cross(), sums.drift()
        return twin

    @property
    def mean_square(self) -> float:
        """`mean(diag G)`, the unit of dampings and penalties; 1 where nothing was seen."""
        return float(np.trace(self.gram)) / len(self.gram) or 1.0

    @property
    def dense_gram(self) -> Matrix:
        """`sum x x^T [width, width]`, from `x = x* - (x* - x)`."""
        return self.gram - self.cross - self.cross.T + self.drift

    @property
    def target_cross(self) -> Matrix:
        """`K = sum x x*^T [width, width]`: `W K` is what `V G` should be."""
        return self.gram - self.cross
