"""A look at the dense model before a run: every decoder layer on a few windows, one in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from rsprune.calibrate import LayerJob
from rsprune.memory import give_freed_pages_back
from rsprune.methods.base import SURVEYED
from rsprune.plan import Prepared
from rsprune.timing import Timing
from rsprune.windows import FEW, Split, Windows


class Spill(NamedTuple):
    """Folders for what is not to be in memory."""

    sums: Path | None = None
    solver: Path | None = None


IN_MEMORY = Spill()


@dataclass(frozen=True)
class Seen:
    """One layer on the dense model's hidden states.

    Attributes:
        index: of the layer, which is materialised.
        job: its way through the windows; ask it for `groups(hidden, hidden)` or for `outputs()`.
        hidden: its inputs.
    """

    index: int
    job: LayerJob
    hidden: Windows

    def outputs(self) -> Windows:
        """What the layer makes of its inputs, where no sums are wanted."""
        self.job.open(self.hidden, self.hidden)
        self.job.replay(())
        return self.job.outputs


def few(count: int) -> Split:
    """How many of `count` windows are looked at."""
    chosen = min(count, FEW.count)
    held = min(FEW.heldout, chosen - 1)
    return Split(chosen - held, held)


def survey(
    prepared: Prepared, windows: Tensor, split: Split, threads: int, spill: Path | None = None
) -> Iterator[Seen]:
    """Yields the layers in order; the caller runs each before it asks for the next.

    Args:
        prepared: the open model.
        windows: [count, tokens] ids; the first `split.count` are used.
        split: which of them are for calibration, and which are held out.
        threads: worker threads.
        spill: a folder for sums, where they are not to be in memory.
    """
    skeleton, stream = prepared.skeleton, prepared.stream
    chosen = windows[: split.count]
    rooms: dict[str, Windows] = {}

    def room(kind: str, channels: int) -> Windows:
        if kind not in rooms:
            rooms[kind] = Windows(split.count, chosen.shape[1], channels)
        return rooms[kind]

    now = room("hidden", skeleton.channels)
    for window, hidden in enumerate(stream.embed(chosen)):
        now.put(window, hidden)
    for index, layer in enumerate(skeleton.layers):
        skeleton.load_layer(index)
        job = LayerJob(
            layer=layer,
            structure=prepared.opening.structures[index],
            kwargs=stream.kwargs(index),
            inputs=SURVEYED,
            split=split,
            threads=threads,
            store=room,
            pool=skeleton.pool,
            where=f"layer {index}",
            timing=Timing(),
            spill_sums=spill,
        )
        yield Seen(index, job, now)
        rooms["hidden"], rooms["next"] = job.advance()[0], now
        now = rooms["hidden"]
        skeleton.drop_layer(index)
        give_freed_pages_back()
