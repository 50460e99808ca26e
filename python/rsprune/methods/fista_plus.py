"""FISTA-plus: the convex method made to work; ours, after FISTAPruner.

    min_V 1/2 ||V X* - W X||^2 + lambda sum |v_ij| sqrt(G_jj),   rounded, refitted, judged held out

Scaled variables, momentum restarted row by row, a refit inside of every round, the best point by
held-out error, polished at the end (see the core's `fista_plus.rs`). The published method is run as
well, and its polished point is returned where it is better: never worse than `fista`.
"""

from __future__ import annotations

from typing import Literal

from rsprune import _core
from rsprune.config import Config
from rsprune.methods.base import BLENDED, Operator, Pruned, Workspace
from rsprune.methods.fista import TYPICAL_ROUNDS, start_of

LAMBDA_START = 0.05
"""In units of the scaled weights' rms."""

MAX_ROUNDS = 12
"""The core's; for estimates."""


class FistaPlus:
    """The convex method with scaling, restarts and refits."""

    name = "fista-plus"
    source = "rsprune, after FISTAPruner, arXiv 2408.03728"
    scope: Literal["row", "matrix"] = "matrix"
    inputs = BLENDED
    permute = False

    def workspace(self, columns: int) -> Workspace:
        """See `Method.workspace`."""
        return Workspace(matrices=9, squares=1, resident=1)

    def products(self, config: Config) -> float:
        """See `Method.products`."""
        rounds = config.max_rounds or MAX_ROUNDS
        published = min(config.max_rounds or TYPICAL_ROUNDS, TYPICAL_ROUNDS) * min(
            config.iterations, 20
        )
        return float(rounds * (config.iterations + 9) + published + 7 * config.polish_steps)

    def solve(
        self, operator: Operator, config: Config, *, model_type: str, threads: int | None
    ) -> Pruned:
        """See `Method.solve`."""
        return Pruned(
            *_core.fista_plus(
                operator,
                iterations=config.iterations,
                xi=config.xi,
                patience=config.patience,
                max_rounds=config.max_rounds,
                polish_steps=config.polish_steps,
                lambda_start=config.lambda_start or LAMBDA_START,
                floor=start_of(config, model_type),
                threads=threads,
            )
        )
