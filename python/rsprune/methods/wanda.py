"""Wanda: keep the largest `|w_ij| sqrt(G_jj)`; kept weights stay as they are."""

from __future__ import annotations

from typing import Literal

from rsprune import _core
from rsprune.config import Config
from rsprune.methods.base import Inputs, Operator, Pruned, Workspace


class Wanda:
    """Scores weights by their size times the norm of the input that they see."""

    name = "wanda"
    source = "Sun et al. 2023, arXiv 2306.11695"
    scope: Literal["row", "matrix"] = "row"
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
        return Pruned(*_core.wanda(operator, threads=threads))
