"""PBS2P's objective with exact compensation, decisions taken again, and codes by true bits (ours).

    min sum of relative losses   subject to   true bits of all operators <= bits

Every operator gets one of nine codes, chosen by measured loss (see `rsprune.codes`); how a code's
places and signs are chosen stands in the core's `binarize/exact.rs`, for two planes of signs in
`binarize/residual.rs`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from rsprune import _core
from rsprune.config import Config
from rsprune.errors import UsageError
from rsprune.methods.base import Inputs, Operator, Packed, Pruned
from rsprune.methods.binarizer import DEFAULT_PATTERN, Binarizer

CODES = ("2:8", "8:8", "3:8", "3:4", "4:8", "5:8", "8:8 + 1:8", "8:8 + 2:8", "8:8 + 8:8")
"""By bits; after a plus that of a second plane of signs. 4:8 and 5:8 take the same; 5:8 errs about
5 % less where no few weights are large."""
REACH = 0.75
"""Codes that take more or fewer bits than asked by this are not measured. Nor are second planes
where one suffices: such weights take two products, and have no ternary type in GGUF."""
ONE_PLANE = 1.4
"""True bits up to which one plane suffices, whatever the shapes."""
DEFAULT_BITS = 1.0
"""True bits a weight."""


def fixed(config: Config) -> bool:
    """Whether the user names the code of all operators."""
    return config.pattern != DEFAULT_PATTERN


class Planes(NamedTuple):
    """A code, taken apart."""

    pattern: _core.Pattern
    """Of the first plane of signs."""
    residual: _core.Pattern | None
    """Of the second."""

    @classmethod
    def of(cls, code: str) -> Planes:
        """Reads an element of `CODES`."""
        first, _, second = code.partition(" + ")
        pattern = _core.Pattern(first, "row")
        return cls(pattern, _core.Pattern(second, "row") if second else None)

    def bits(self, columns: int) -> float:
        """Bits a weight in rows of so many columns, everything counted."""
        return sum(_core.signs_bits(plane, columns) for plane in self if plane is not None)


def mean_bits(code: str, shapes: Sequence[tuple[int, int]]) -> float:
    """Bits a weight of matrices of these shapes (rows, columns) together."""
    planes, weights = Planes.of(code), sum(rows * columns for rows, columns in shapes)
    return sum(rows * columns * planes.bits(columns) for rows, columns in shapes) / weights


def measured_codes(asked: float, shapes: Sequence[tuple[int, int]]) -> list[str]:
    """The codes worth measuring for a budget: those near it, and the largest that fits into it."""
    bits = {code: mean_bits(code, shapes) for code in CODES}
    one_plane = {code: bits[code] for code in CODES if Planes.of(code).residual is None}
    if asked <= max(one_plane.values()):
        bits = one_plane
    largest = max((code for code in bits if bits[code] <= asked), key=lambda code: bits[code])
    return [code for code in bits if abs(bits[code] - asked) <= REACH or code == largest]


class PBS2PExact(Binarizer):
    """`--bits` of 0.94 and more, everything counted; or one code for all, `--pattern 8:8`."""

    name = "pbs2p-exact"
    source = "rsprune; objective of PBS2P, arXiv 2502.01705"
    inputs = Inputs(propagate="model", target="dense", true_sequential=True, correction=0.25)
    """A quarter of the drift is made up for, as by the leading solvers, but massive tokens count in
    full: at so few bits they are lost otherwise (both measured: benches/records, `-binary.md`)."""
    coded: ClassVar[str] = "8:8"

    def check(self, config: Config) -> str:
        """See `Binarizer.check`; bits that are too few for the shapes are refused by the plan."""
        super().check(config.model_copy(update={"bits": None, "pattern": DEFAULT_PATTERN}))
        if not fixed(config):
            return self.coded
        codes = [code for code in CODES if Planes.of(code).residual is None]
        if config.pattern not in codes:
            raise UsageError(
                f"option pattern: pbs2p-exact expects one of {', '.join(codes)}, "
                f"found {config.pattern}"
            )
        if config.bits is not None:
            raise UsageError(
                f"option bits: expected none beside a pattern for all, found {config.bits:g}"
            )
        return config.pattern

    def check_shapes(self, shapes: Sequence[tuple[int, int]], config: Config) -> list[str]:
        """See `Binarizer.check_shapes`."""
        if fixed(config):
            return []
        asked = config.bits or DEFAULT_BITS
        smallest, largest = mean_bits(CODES[0], shapes), mean_bits(CODES[-1], shapes)
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

    def most_bits(self, config: Config) -> float:
        """See `Binarizer.most_bits`."""
        return 2.0 if fixed(config) else (config.bits or DEFAULT_BITS) + 0.1

    def kept_bits(self, config: Config) -> float:
        """See `Binarizer.kept_bits`: second planes alone are given, and one layer may have most."""
        return 2.2 if (config.bits or DEFAULT_BITS) > ONE_PLANE else 0.0

    def solve(
        self, operator: Operator, config: Config, *, model_type: str, threads: int | None
    ) -> Pruned:
        """See `Method.solve`."""
        if operator.residual is None:
            return Pruned(*_core.pbs2p_exact(operator, damping=config.damping, threads=threads))
        second = dataclasses.replace(operator, pattern=operator.residual)
        weight, certificate, packed = _core.pbs2p_residual(
            second, damping=config.damping, threads=threads
        )
        return Pruned(weight, certificate, Packed(*packed))
