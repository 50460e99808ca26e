"""Which stand-in a removed layer gets.

    free      delete, or fold where it lowers the held-out error
    paid      map, shared, own, svd: the one with the largest drop of the error a stored byte, where
              it lowers the error by a hundredth at least

The drop is measured from what is free, on held-out windows, with tensors as they are stored. None
is taken whose error on the calibration windows is above that of deletion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rsprune.flexi.site import StandIn

WORTH = 0.01
"""The least drop, relative to the error of what is free, for which bytes are spent."""


@dataclass(frozen=True)
class Choice:
    """What a layer gets.

    Attributes:
        free: deletion or fold.
        paid: what comes in its place, or on top of it if it is a map; None for nothing.
        candidates: all that were measured, deletion first.
    """

    free: StandIn
    paid: StandIn | None
    candidates: tuple[StandIn, ...]

    @property
    def final(self) -> StandIn:
        """What is in force."""
        return self.paid or self.free

    @property
    def record(self) -> dict[str, Any]:
        """For the report: what it got, why, and all candidates."""
        return {
            "option": self.final.option,
            "on_fold": self.free.option == "fold" and self.final.option == "map",
            "source": self.final.block.source,
            "errors": self.final.errors,
            "bytes": self.final.nbytes,
            "why": self._why(),
            "candidates": [
                {
                    "option": each.option,
                    "source": each.block.source,
                    "calibration": each.errors[0],
                    "heldout": each.errors[1],
                    "bytes": each.nbytes,
                    "drop_per_mib": drop_per_byte(self.free, each) * 2**20,
                }
                for each in self.candidates
            ],
        }

    def _why(self) -> str:
        deleted = self.candidates[0].judged
        drop = f"error {deleted:.4f} -> {self.final.judged:.4f}"
        if self.paid is not None:
            return f"{drop}: the largest drop a stored byte"
        if self.free.option == "fold":
            return f"{drop} at no cost; no other lowers it by {WORTH:.0%} more"
        return f"nothing lowers the error {deleted:.4f} by {WORTH:.0%}"


def choose(candidates: Sequence[StandIn]) -> Choice:
    """Chooses among measured stand-ins.

    Args:
        candidates: deletion first; `map` measured on top of the fold, if that is better than
            deletion.
    """
    deleted = candidates[0]
    free = deleted
    for each in candidates[1:]:
        if each.option == "fold" and allowed(each, deleted) and each.judged < deleted.judged:
            free = each
    paid = [
        each
        for each in candidates[1:]
        if each.option != "fold"
        and allowed(each, deleted)
        and each.judged < (1.0 - WORTH) * free.judged
    ]
    best = max(paid, key=lambda each: drop_per_byte(free, each), default=None)
    return Choice(free, best, tuple(candidates))


def allowed(each: StandIn, deleted: StandIn) -> bool:
    """Whether a stand-in is no worse than deletion on the calibration windows."""
    return each.errors[0] <= deleted.errors[0]


def drop_per_byte(free: StandIn, each: StandIn) -> float:
    """What a stored byte takes off the error; 0 for what is free itself."""
    return (free.judged - each.judged) / each.nbytes if each.nbytes else 0.0
