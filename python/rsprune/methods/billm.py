"""BiLLM: every weight a sign, two in salient columns, two magnitude groups elsewhere.

Published and reconstructed parts: see the core's `binarize/billm.rs`. A baseline.
"""

from __future__ import annotations

from typing import ClassVar

from rsprune import _core
from rsprune.config import Config
from rsprune.methods.base import Operator, Packed, Pruned
from rsprune.methods.binarizer import Binarizer


class BiLLM(Binarizer):
    """2.9 true bits, 1.1 as the paper counts."""

    name = "billm"
    source = "BiLLM, Huang et al. 2024, arXiv 2402.04291"
    coded: ClassVar[str] = "8:8"

    def solve(
        self, operator: Operator, config: Config, *, model_type: str, threads: int | None
    ) -> Pruned:
        """See `Method.solve`."""
        weight, certificate, packed = _core.billm(operator, damping=config.damping, threads=threads)
        return Pruned(weight, certificate, Packed(*packed))
