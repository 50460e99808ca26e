"""FISTAPruner, faithful mode: l1 relaxation by FISTA, rounding, adaptive lambda.

    min_V 1/2 ||V X* - W X||^2 + lambda sum |v_ij|,   then V rounded to the pattern

Published: the objective, step 1/L, 20 iterations a round, xi = 0.3, patience 3, warm start from
Wanda (Llama) or SparseGPT (OPT), inputs corrected inside of each decoder layer, layers independent.
Reconstructed: the units of lambda, its start and its bracketing (see the core's `fista.rs`).
"""

from __future__ import annotations

from typing import Literal

from rsprune import _core
from rsprune.config import Config
from rsprune.methods.base import Inputs, Operator, Pruned, Workspace

LAMBDA_START = 0.01
"""In units of the mean squared input times the weights' rms; reconstructed."""

TYPICAL_ROUNDS = 16
"""After which the search for lambda ends; for estimates."""


class Fista:
    """The convex method, with the constants of the paper."""

    name = "fista"
    source = "FISTAPruner, EMNLP 2025, arXiv 2408.03728"
    scope: Literal["row", "matrix"] = "matrix"
    inputs = Inputs(propagate="layer", target="dense", true_sequential=True)
    permute = False

    def workspace(self, columns: int) -> Workspace:
        """See `Method.workspace`."""
        return Workspace(matrices=6, squares=0, resident=1)

    def products(self, config: Config) -> float:
        """See `Method.products`."""
        return float(
            min(config.max_rounds or TYPICAL_ROUNDS, TYPICAL_ROUNDS) * config.iterations + 35
        )

    def solve(
        self, operator: Operator, config: Config, *, model_type: str, threads: int | None
    ) -> Pruned:
        """See `Method.solve`."""
        return Pruned(
            *_core.fista(
                operator,
                warm_start=start_of(config, model_type),
                iterations=config.iterations,
                xi=config.xi,
                patience=config.patience,
                max_rounds=config.max_rounds,
                lambda_start=config.lambda_start or LAMBDA_START,
                damping=config.damping,
                threads=threads,
            )
        )


def start_of(config: Config, model_type: str) -> str:
    """The warm start: the user's, or the published one (SparseGPT for OPT, Wanda for Llama)."""
    if config.warm_start != "auto":
        return config.warm_start
    return "sparsegpt" if model_type == "opt" else "wanda"
