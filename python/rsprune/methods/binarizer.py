"""What methods have in common that leave codes of a bit or a few instead of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from rsprune.config import Config
from rsprune.errors import UsageError
from rsprune.methods.base import Inputs, Workspace

CHANGERS = ("refit", "search", "tune_block", "allocate", "permute")
"""Options of steps that treat weights as numbers of their own."""
DEFAULT_PATTERN: str = Config.model_fields["pattern"].default
"""Stands for a pattern that nobody has asked for."""


class Binarizer:
    """Beside what `Method` asks for: the pattern that weights are coded by, and refusals."""

    name: str
    scope: Literal["row", "matrix"] = "row"
    inputs = Inputs(propagate="model", target="own", true_sequential=False)
    permute = False

    coded: ClassVar[str] = "0%"
    """What a weight's rows must be divisible by, as a pattern; nothing is pruned unless it says."""

    def workspace(self, columns: int) -> Workspace:
        """See `Method.workspace`."""
        return Workspace(matrices=4, squares=0, resident=1, kept=1)

    def most_bits(self, config: Config) -> float:
        """Bits a weight that all packed forms together take at most; a plan counts on them."""
        return 3.5

    def kept_bits(self, config: Config) -> float:
        """The same of one layer, of forms that `solve` gives beside the weights."""
        return self.most_bits(config)

    def products(self, config: Config) -> float:
        """See `Method.products`."""
        return 8.0

    def check(self, config: Config) -> str:
        """The pattern of the run.

        Raises:
            UsageError: an option does not go with this method.
        """
        for option in CHANGERS:
            if getattr(config, option):
                raise UsageError(
                    f"option {option}: expected off beside {self.name}, whose weights are codes, "
                    "found on"
                )
        if config.bits is not None:
            self._refuse("bits", config)
        if config.pattern != DEFAULT_PATTERN:
            self._refuse("pattern", config)
        return self.coded

    def check_shapes(self, shapes: Sequence[tuple[int, int]], config: Config) -> list[str]:
        """Warnings about what is asked of the shapes of all operators, rows and columns.

        Raises:
            UsageError: they take more than that; says how much.
        """
        return []

    def _refuse(self, option: str, config: Config) -> None:
        found = getattr(config, option)
        raise UsageError(f"option {option}: {self.name} does not take it, found {found}")
