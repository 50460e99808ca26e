"""ADMM with a growing penalty (ALPS), then a refit of the kept weights.

    min_V 1/2 ||V X* - W X||^2   subject to   V = Z,  Z in the pattern

Published: the splitting, the scaled variables, rho from 0.1 by factors of 1.3 / 1.2 / 1.1, the stop
when the support rests, conjugate gradients on it. Ours: the slow schedule (see the core's
`admm.rs`) and corrected inputs.
"""

from __future__ import annotations

from typing import Literal

from rsprune import _core
from rsprune.config import Config
from rsprune.methods.base import BLENDED, Operator, Pruned, Workspace

LARGEST_INVERSE = 8192
"""Wider operators are solved by conjugate gradients, without an inverse."""


def inverses(columns: int) -> int:
    """Matrices of the Gram's size that hold an inverse, as it is made and packed."""
    return 2 if columns <= LARGEST_INVERSE else 0


class Admm:
    """The splitting method with the lowest layer error of any single one."""

    name = "admm"
    source = "ALPS, Meng et al. 2024, arXiv 2406.07831"
    scope: Literal["row", "matrix"] = "matrix"
    inputs = BLENDED
    permute = False

    def workspace(self, columns: int) -> Workspace:
        """See `Method.workspace`."""
        return Workspace(matrices=7, squares=1, resident=inverses(columns) + 1)

    def products(self, config: Config) -> float:
        """See `Method.products`."""
        return 260.0 if config.rho_schedule == "slow" else 100.0

    def solve(
        self, operator: Operator, config: Config, *, model_type: str, threads: int | None
    ) -> Pruned:
        """See `Method.solve`."""
        slow = config.rho_schedule == "slow"
        return Pruned(*_core.admm(operator, damping=config.damping, slow=slow, threads=threads))
