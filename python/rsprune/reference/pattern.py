"""Which weights may stay: `keep:of` groups along a row, or a sparsity ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Pattern:
    """`Pattern("2:4")`, `Pattern("50%", "matrix")`.

    Attributes:
        text: `keep:of`, a percentage, or a fraction of zeros.
        scope: over what a ratio is counted; `keep:of` has no use for it.
    """

    text: str
    scope: Literal["row", "matrix"] = "row"

    @property
    def group(self) -> tuple[int, int] | None:
        """`(keep, of)`, or None for a ratio."""
        if ":" not in self.text:
            return None
        keep, of = self.text.split(":")
        return int(keep), int(of)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros that the pattern asks for."""
        if self.group is not None:
            keep, of = self.group
            return 1 - keep / of
        percent = self.text.endswith("%")
        return float(self.text.removesuffix("%")) / (100 if percent else 1)

    def units(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """`values [m, n]` as `[units, len]`: what is ranked together stands in one row."""
        if self.group is not None:
            return values.reshape(-1, self.group[1])
        return values.reshape(1, -1) if self.scope == "matrix" else values

    def zeros(self, length: int) -> int:
        """Zeros of a unit of `length` weights; halves are rounded up."""
        if self.group is not None:
            return self.group[1] - self.group[0]
        return math.floor(self.sparsity * length + 0.5)

    def mask(self, scores: NDArray[np.float64], before: int = 0) -> Mask:
        """True where a weight goes: in every unit the lowest of `scores [m, n]`, first ones first.

        Args:
            scores: of all columns, or of a part of them.
            before: how many columns stand left of a part. A ratio's parts, from the left, have
                together the zeros of the whole.

        Returns:
            A mask [m, n].
        """
        units = self.units(scores)
        zeros = self.zeros(units.shape[1])
        if self.group is None:
            skipped = before * units.shape[1] // scores.shape[1]
            zeros = self.zeros(skipped + units.shape[1]) - self.zeros(skipped)
        order = np.argsort(units, axis=1, kind="stable")
        goes = np.zeros(units.shape, bool)
        np.put_along_axis(goes, order[:, :zeros], True, axis=1)
        return goes.reshape(scores.shape)

    def holds(self, values: NDArray[np.float64]) -> bool:
        """Whether `values [m, n]` has at least the zeros of the pattern in every unit."""
        units = self.units(values)
        return bool(((units == 0).sum(axis=1) >= self.zeros(units.shape[1])).all())
