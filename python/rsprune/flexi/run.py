"""A run that replaces decoder layers, in the order in which things happen.

plan            headers and shapes only; all refusals happen here
read            texts, tokenizer, every weight
take up         a new journal, or that of a run that ended early
remove          block influence says which layers go
for each layer that stays:
    replace     the removed layers behind it, one after another
    put         one output shard for all of it, one journal line
finish          shard of the rest, config.json cut, card, index; one rename
"""

from __future__ import annotations

import time
from typing import Any

import torch

from rsprune.depth.cut import cut_config, new_names
from rsprune.depth.plan import read_config_text
from rsprune.depth.run import DepthRun
from rsprune.depth.walk import Arguments, Walk
from rsprune.flexi.card import flexi_card
from rsprune.flexi.extend import extended
from rsprune.flexi.plan import prepare
from rsprune.flexi.positions import (
    NAMES,
    Position,
    copied_names,
    final_blocks,
    new_tensors,
    restored,
)
from rsprune.flexi.replace import Replacer
from rsprune.memory import give_freed_pages_back
from rsprune.output import OutputFolder
from rsprune.packing import settings
from rsprune.replaced import block_settings
from rsprune.windows import Split


class FlexiRun(DepthRun):
    """One run; its methods stand in the order in which they are called."""

    prepare = staticmethod(prepare)
    card = staticmethod(flexi_card)

    @property
    def needs_windows(self) -> bool:
        """Stand-ins are fitted to windows; repetitions are not."""
        return not self.config.extend

    def write_layers(self, output: OutputFolder) -> None:
        """Chooses the layers that go, and writes what is left with what stands in for them."""
        self.positions: list[Position] = []
        with Walk(self.opened.stream, self.threads, output.scratch) as walk:
            if self.config.extend:
                self.kept = list(range(self.plan.layers))
                self._write_extended(output)
            else:
                self.kept = self._choose(walk)
                self._write_units(output, walk)
        self._settle()

    def _write_units(self, output: OutputFolder, walk: Walk) -> None:
        """Every unit: replaced, or replayed where an earlier run has finished it."""
        self.progress.stage("replace", self.prepared.removal.count)
        units = units_of(self.kept, self.plan.layers)
        finished = {record["layer"]: record for record in self._done("layer")}
        last = max(number for number, (_, removed) in enumerate(units) if removed)
        replacer = None if last < len(finished) else self._replacer(output, walk)
        for number, (index, removed) in enumerate(units):
            if (record := finished.get(number)) is not None:
                path, first = output.folder / record["file"], len(self.positions)
                positions = restored(path, self.opened.skeleton, record, first)
                if replacer is not None:
                    replacer.replay(index, removed, positions)
                self._count_in(output, record["file"], positions)
                continue
            started = time.perf_counter()
            records: list[dict[str, Any]] = []
            positions = [Position(index)]
            if number <= last:
                assert replacer is not None
                with self.timing.stage("replace"):
                    positions, records = replacer.unit(index, removed)
            self._put(output, number, positions, started, blocks=records)

    def _replacer(self, output: OutputFolder, walk: Walk) -> Replacer:
        assert self.windows is not None
        calibration, heldout = self.windows.calibration, self.windows.heldout
        ids = torch.cat([calibration, heldout])
        dense = walk.store("flexi dense", *ids.shape)
        kwargs: Arguments = walk.embed(ids, dense)
        split = Split(len(calibration), len(heldout))
        return Replacer(
            walk, self.opened.opening, kwargs, dense, self.kept, split, self.config,
            output.scratch, self.progress,
        )  # fmt: skip

    def _write_extended(self, output: OutputFolder) -> None:
        """Every layer, some of them with a repetition behind."""
        self.progress.stage("write", self.plan.layers)
        finished = {record["layer"]: record for record in self._done("layer")}
        repetitions = extended(self.opened, self.config)
        for number, positions in enumerate(repetitions):
            if (record := finished.get(number)) is not None:
                self._count_in(output, record["file"], positions)
            else:
                self._put(output, number, positions, time.perf_counter())
            self.progress.step(f"layer {number}")

    def _put(
        self, output: OutputFolder, number: int, positions: list[Position], started: float,
        **fields: Any,
    ) -> None:  # fmt: skip
        """Writes a unit's shard and its line."""
        copied, new = self._tensors(positions)
        with self.timing.stage("write"):
            record = output.put_tensors(
                self._shard(number + 1), self.opened.checkpoint, copied, new
            )
        assert self.journal is not None
        self.journal.write(
            "layer", layer=number, dense_layer=positions[0].origin,
            positions=[position.record() for position in positions],
            seconds=time.perf_counter() - started, rss_anon=self.peak.sample(), **record, **fields,
        )  # fmt: skip
        self.positions += positions
        give_freed_pages_back()

    def _count_in(self, output: OutputFolder, file: str, positions: list[Position]) -> None:
        """A unit that an earlier run has written."""
        copied, new = self._tensors(positions)
        output.keep_tensors(file, self.opened.checkpoint, copied, new)
        self.positions += positions

    def _tensors(
        self, positions: list[Position]
    ) -> tuple[dict[str, str], dict[str, tuple[str, torch.Tensor]]]:
        """What a shard copies (name -> new name), and what is new in it."""
        skeleton = self.opened.skeleton
        copied: dict[str, str] = {}
        new: dict[str, tuple[str, torch.Tensor]] = {}
        for number, position in enumerate(positions, start=len(self.positions)):
            copied |= copied_names(skeleton, position, number)
            for name, value in new_tensors(skeleton, position, number).items():
                new[name] = (NAMES[value.dtype], value)
        return copied, new

    def _settle(self) -> None:
        """What `finish` writes: config.json and the names of what lies outside of the layers."""
        skeleton, origins = self.opened.skeleton, [each.origin for each in self.positions]
        self.cut = cut_config(
            read_config_text(self.plan.model), skeleton, origins,
            trust_remote_code=self.config.trust_remote_code,
        )  # fmt: skip
        if blocks := final_blocks(self.positions):
            self.cut["quantization_config"] = {**settings({}), "blocks": block_settings(blocks)}
        self.names = {None: new_names(skeleton, origins)[None]}


def units_of(kept: list[int], layers: int) -> list[tuple[int, list[int]]]:
    """Every layer that stays, with the removed ones behind it."""
    ends = [*kept[1:], layers]
    return [(index, list(range(index + 1, end))) for index, end in zip(kept, ends, strict=True)]
