"""ARB-LLM in its row-column form: a sign, a scale of the row and one of the column.

Published and left-out parts: see the core's `binarize/arb.rs`. A baseline.
"""

from __future__ import annotations

from rsprune import _core
from rsprune.config import Config
from rsprune.methods.base import Operator, Packed, Pruned
from rsprune.methods.binarizer import Binarizer


class ARB(Binarizer):
    """About 1.15 true bits, 1 as the paper counts."""

    name = "arb"
    source = "ARB-LLM, Li et al. 2024, arXiv 2410.03129"

    def most_bits(self, config: Config) -> float:
        """See `Binarizer.most_bits`."""
        return 1.5

    def solve(
        self, operator: Operator, config: Config, *, model_type: str, threads: int | None
    ) -> Pruned:
        """See `Method.solve`."""
        weight, certificate, packed = _core.arb(operator, damping=config.damping, threads=threads)
        return Pruned(weight, certificate, Packed(*packed))
