"""SparseGPT: prune column after column, let the later columns make up for what was lost."""

from __future__ import annotations

from typing import Literal

from rsprune import _core
from rsprune.config import Config
from rsprune.methods.base import Inputs, Operator, Pruned, Workspace


class SparseGPT:
    """Column blocks of 128, relative damping, masks chosen as the sweep goes."""

    name = "sparsegpt"
    source = "Frantar and Alistarh 2023, arXiv 2301.00774"
    scope: Literal["row", "matrix"] = "matrix"
    inputs = Inputs(propagate="model", target="own", true_sequential=False)
    permute = False

    def workspace(self, columns: int) -> Workspace:
        """See `Method.workspace`."""
        return Workspace(matrices=4, squares=0, resident=1)

    def products(self, config: Config) -> float:
        """See `Method.products`."""
        return 6.0

    def solve(
        self, operator: Operator, config: Config, *, model_type: str, threads: int | None
    ) -> Pruned:
        """See `Method.solve`."""
        return Pruned(*_core.sparsegpt(operator, damping=config.damping, threads=threads))
