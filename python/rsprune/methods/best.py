"""Best: several methods for every operator, each polished; the lowest held-out error is kept.

Candidates are ADMM (slow schedule), SparseGPT, and with a budget of 1,120 FISTA-plus. The budget
counts products with the Gram, so the result does not depend on how busy the machine is.
"""

from __future__ import annotations

from typing import Literal

from rsprune import _core
from rsprune.config import Config
from rsprune.methods.admm import inverses
from rsprune.methods.base import BLENDED, Operator, Pruned, Workspace


class Best:
    """The leading methods with a choice by held-out error."""

    name = "best"
    source = "rsprune"
    scope: Literal["row", "matrix"] = "matrix"
    inputs = BLENDED
    permute = True

    def workspace(self, columns: int) -> Workspace:
        """See `Method.workspace`."""
        return Workspace(matrices=11, squares=1, resident=inverses(columns) + 1)

    def products(self, config: Config) -> float:
        """See `Method.products`."""
        return min(float(config.budget), 1116.0) + 10

    def solve(
        self, operator: Operator, config: Config, *, model_type: str, threads: int | None
    ) -> Pruned:
        """See `Method.solve`."""
        return Pruned(*_core.best(operator, budget=config.budget, threads=threads))
