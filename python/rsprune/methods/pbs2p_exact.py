"""PBS2P's objective with exact compensation, decisions taken again, and codes by true bits (ours).

    min sum of relative losses   subject to   true bits of all operators <= bits

Every operator gets one of six codes, chosen by measured loss (see `rsprune.codes`); how a code's
places and signs are chosen stands in the core's `binarize/exact.rs`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from rsprune import _core
from rsprune.config import Config
from rsprune.errors import UsageError
from rsprune.methods.base import Operator, Pruned
from rsprune.methods.binarizer import Binarizer

CODES = ("2:8", "8:8", "3:8", "3:4", "4:8", "5:8")
"""By bits. The last two take the same; 5:8 errs about 5 % less where no few weights are large."""
DEFAULT_BITS = 1.0
"""True bits a weight."""


class PBS2PExact(Binarizer):
    """`--bits` of 0.94 and more, everything counted."""

    name = "pbs2p-exact"
    source = "rsprune; objective of PBS2P, arXiv 2502.01705"
    coded: ClassVar[str] = "8:8"

    def check(self, config: Config) -> str:
        """See `Binarizer.check`; bits that are too few for the shapes are refused by the plan."""
        return super().check(config.model_copy(update={"bits": None}))

    def check_shapes(self, shapes: Sequence[tuple[int, int]], config: Config) -> list[str]:
        """See `Binarizer.check_shapes`."""
        asked, weights = config.bits or DEFAULT_BITS, sum(rows * cols for rows, cols in shapes)

        def bits(code: str) -> float:
            pattern = _core.Pattern(code, "row")
            return sum(r * c * _core.signs_bits(pattern, c) for r, c in shapes) / weights

        smallest, largest = bits(CODES[0]), bits(CODES[-1])
        if asked < smallest:
            raise UsageError(
                f"option bits: pbs2p-exact expects at least {math.ceil(smallest * 1e4) / 1e4:g}, "
                f"which the code {CODES[0]} takes of these weights, found {asked:g}"
            )
        if asked <= largest:
            return []
        return [
            f"option bits: no code takes more than {largest:.4g} of these weights, asked {asked:g}"
        ]

    def solve(
        self, operator: Operator, config: Config, *, model_type: str, threads: int | None
    ) -> Pruned:
        """See `Method.solve`."""
        return Pruned(*_core.pbs2p_exact(operator, damping=config.damping, threads=threads))
