"""Magnitude pruning: keep the largest `|w|`. No calibration enters the choice."""

from __future__ import annotations

from typing import Literal

from rsprune import _core
from rsprune.config import Config
from rsprune.methods.base import Inputs, Operator, Pruned, Workspace


class Magnitude:
    """Zeroes the smallest weights: of every group, of every row, or of the matrix."""

    name = "magnitude"
    source = "Han et al. 2015, arXiv 1506.02626"
    scope: Literal["row", "matrix"] = "matrix"
    inputs = Inputs(propagate="model", target="own", true_sequential=False)
    permute = False

    def workspace(self, columns: int) -> Workspace:
        """See `Method.workspace`."""
        return Workspace(matrices=2, squares=0, resident=0)

    def products(self, config: Config) -> float:
        """See `Method.products`."""
        return 3.0

    def solve(
        self, operator: Operator, config: Config, *, model_type: str, threads: int | None
    ) -> Pruned:
        """See `Method.solve`."""
        return Pruned(*_core.magnitude(operator, threads=threads))
