"""The lowest layer goes, again and again; every removal is a line of the journal.

kept = all layers
until enough are gone:
    scores = metric(kept)                  anew in every iteration, or once
    the unprotected layer with the lowest score goes
    journal: what went, and all scores     from now on this iteration is finished
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rsprune.config import Config
from rsprune.depth.scores import DepthMethod, Scores, Scoring, listed_layers
from rsprune.errors import UsageError


@dataclass(frozen=True)
class Removal:
    """What a run removes.

    Attributes:
        count: layers that go.
        protected: layers that stay, whatever their score.
        layers: of the dense model.
    """

    count: int
    protected: frozenset[int]
    layers: int

    @property
    def candidates(self) -> list[int]:
        """Layers that may go."""
        return [index for index in range(self.layers) if index not in self.protected]


def parse_removal(config: Config, layers: int) -> Removal:
    """What `remove` and `protect` mean for a model of so many layers.

    Raises:
        UsageError: `remove` is missing or no number, or asks for more than may go.
    """
    text = config.remove
    if config.method == "given":
        return _listed(listed_layers(config), layers)
    if text is None:
        raise UsageError("option remove: expected a number of layers or a share such as 20%")
    if match := re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", text):
        count = round(float(match[1]) / 100 * layers)
    elif match := re.fullmatch(r"\s*([0-9]+)\s*", text):
        count = int(match[1])
    else:
        raise UsageError(
            f"option remove: expected a number of layers or a share such as 20%, found {text!r}"
        )
    first, last = config.protect
    protected = frozenset(i for i in range(layers) if i < first or i >= layers - last)
    removal = Removal(count, protected, layers)
    if count < 1:
        raise UsageError(f"option remove: {text} of {layers} layers is none")
    if count > len(removal.candidates):
        raise UsageError(
            f"option remove: expected at most {len(removal.candidates)} of {layers} layers "
            f"({first} at the start and {last} at the end are protected), found {text}, that is "
            f"{count}"
        )
    return removal


def _listed(listed: list[int], layers: int) -> Removal:
    """Exactly these layers go: all others are protected."""
    if max(listed) >= layers:
        raise UsageError(
            f"option remove: expected layers from 0 to {layers - 1}, found {max(listed)}"
        )
    if len(listed) == layers:
        raise UsageError(f"option remove: all of the {layers} layers are named")
    return Removal(len(listed), frozenset(range(layers)) - frozenset(listed), layers)


def choose(
    method: DepthMethod,
    removal: Removal,
    scoring: Scoring | None,
    done: Sequence[dict[str, Any]],
    note: Callable[..., None],
) -> list[int]:
    """Chooses the layers that stay.

    Args:
        method: how layers are scored.
        removal: how many go, and which may not.
        scoring: what is measured with; None where `done` has all removals.
        done: lines of an earlier run's journal, kind removal.
        note: takes the fields of a new line.

    Returns:
        Numbers of the dense model's layers, in order.
    """
    removed = [int(record["removed"]) for record in done]
    known = _scores_of(done[0]) if done and not method.iterated else None
    for iteration in range(len(removed), removal.count):
        started = time.perf_counter()
        kept = [index for index in range(removal.layers) if index not in removed]
        candidates = [index for index in removal.candidates if index not in removed]
        if method.iterated or known is None:
            assert scoring is not None
            known = method.score(scoring, kept, candidates, iteration)
        scores = {index: known[index] for index in candidates}
        removed.append(lowest(scores))
        seconds = time.perf_counter() - started
        note(iteration=iteration, removed=removed[-1], scores=scores, seconds=seconds)
    return [index for index in range(removal.layers) if index not in removed]


def lowest(scores: Scores) -> int:
    """The layer with the lowest score; of equal ones the first."""
    return min(scores, key=lambda index: (scores[index], index))


def _scores_of(record: dict[str, Any]) -> Scores:
    return {int(index): float(score) for index, score in record["scores"].items()}
