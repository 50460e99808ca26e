"""GPTQ: evenly spaced levels, column by column with error feedback; anchor of binary methods."""

from __future__ import annotations

from rsprune import _core
from rsprune.config import Config
from rsprune.errors import UsageError
from rsprune.methods.base import Operator, Packed, Pruned
from rsprune.methods.binarizer import Binarizer

WIDTHS = (2, 3, 4)
DEFAULT_BITS = 4


class GPTQ(Binarizer):
    """`--bits` of 2, 3 or 4 and 0.19 more for scale and zero of 128 columns."""

    name = "gptq"
    source = "GPTQ, Frantar et al. 2022, arXiv 2210.17323"

    def check(self, config: Config) -> str:
        """See `Binarizer.check`."""
        if config.bits is not None and config.bits not in WIDTHS:
            raise UsageError(f"option bits: gptq expects 2, 3 or 4, found {config.bits:g}")
        return super().check(config.model_copy(update={"bits": None}))

    def most_bits(self, config: Config) -> float:
        """See `Binarizer.most_bits`."""
        return (config.bits or DEFAULT_BITS) + 0.5

    def solve(
        self, operator: Operator, config: Config, *, model_type: str, threads: int | None
    ) -> Pruned:
        """See `Method.solve`."""
        bits = int(config.bits or DEFAULT_BITS)
        weight, certificate, packed = _core.gptq(
            operator, damping=config.damping, bits=bits, threads=threads
        )
        return Pruned(weight, certificate, Packed(*packed))
