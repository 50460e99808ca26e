"""A unit: a layer that stays, and what stands in for the removed layers behind it.

for the layer that stays:
    run it on both paths; note what its last linear adds
for each removed layer behind it:
    y           the dense layer on the dense path
    stand-ins   fitted on the compressed path, measured as they are stored
    choose      and run on with it
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rsprune.config import Config
from rsprune.depth.fold import residual_linear
from rsprune.depth.walk import Arguments, Walk
from rsprune.flexi import layers as fits
from rsprune.flexi.choose import Choice, choose
from rsprune.flexi.maps import deletion, fit_fold, fit_map, folded, with_errors
from rsprune.flexi.pairs import Pairs, fit_published
from rsprune.flexi.positions import Position
from rsprune.flexi.recover import recovered
from rsprune.flexi.site import Site, StandIn, map_module, observe
from rsprune.layer_path import with_parameters
from rsprune.progress import Progress
from rsprune.stream import Opening
from rsprune.windows import Split, Windows


class Replacer:
    """Takes both paths through the model, unit after unit.

    Args:
        walk: the open dense model.
        opening: what was seen in its layers.
        kwargs: of every layer.
        dense: what enters the first layer; is advanced.
        kept: layers that stay.
        split: of the windows.
        scratch: folder for what is needed more than once.
    """

    def __init__(
        self, walk: Walk, opening: Opening, kwargs: Arguments, dense: Windows,
        kept: Sequence[int], split: Split, config: Config, scratch: Path, progress: Progress,
    ) -> None:  # fmt: skip
        self.walk, self.opening, self.kwargs, self.kept = walk, opening, kwargs, list(kept)
        self.split, self.config, self.progress = split, config, progress
        self.pairs = Pairs(walk, scratch, config.rank)
        self.dense = dense
        self.own = self._store("own")
        self.own.copy_from(dense)

    def _store(self, name: str) -> Windows:
        return self.walk.store(f"flexi {name}", len(self.dense), self.dense.tokens)

    def unit(
        self, index: int, removed: Sequence[int]
    ) -> tuple[list[Position], list[dict[str, Any]]]:
        """Does one unit.

        Returns:
            Its positions, and what is said of every removed layer.
        """
        self.positions = [Position(index)]
        self.linear: str | None = None
        with self.walk.layer(index) as layer:
            self._enter(layer, index, folds=bool(removed) and "fold" in self.config.replace)
        records = [self._replace(each) for each in removed]
        return self.positions, records

    def replay(self, index: int, removed: Sequence[int], positions: Sequence[Position]) -> None:
        """Takes both paths through a unit that an earlier run has finished."""
        for each in (index, *removed):
            with self.walk.layer(each) as layer:
                self.walk.advance(layer, self.kwargs[each], self.dense, self.dense)
        for position in positions:
            position.advance(self.walk, self.kwargs, self.own, self.own)

    def _enter(self, layer: nn.Module, index: int, *, folds: bool) -> None:
        """Runs the layer that stays; keeps what a fold needs."""
        kwargs = self.kwargs[index]
        if folds:
            self.linear = residual_linear(layer, kwargs, self.own.get(0, self.walk.skeleton.device))
        self.walk.advance(layer, kwargs, self.dense, self.dense)
        if self.linear is None:
            self.walk.advance(layer, kwargs, self.own, self.own)
            return
        self.before, self.caught = self._store("before"), self._store("caught")
        self.before.copy_from(self.own)
        self._run_caught(layer, kwargs, self.own, self.caught)

    def _run_caught(
        self, layer: nn.Module, kwargs: dict[str, Any], output: Windows, caught: Windows
    ) -> None:
        """The layer on `before`: its output, and what its last linear adds to it."""
        assert self.linear is not None
        for seen in observe(
            self.walk, layer, kwargs, self.before, [self.linear], range(self.split.count)
        ):
            assert seen.output is not None
            output.put(seen.window, seen.output)
            caught.put(seen.window, seen.outputs[self.linear])

    def _replace(self, index: int) -> dict[str, Any]:
        """Fits what stands in for layer `index`, chooses, and runs on; returns its record."""
        started = time.perf_counter()
        self.dense_out = self._store("dense out")
        site = Site(
            self.walk, index, self.kwargs[index], self.dense, self.dense_out, self.own, self.split,
            self.config.rank,
        )  # fmt: skip
        if self.config.flexigpt_mode == "faithful":
            record = self._published(site)
        else:
            record = self._best(site)
        self.dense.copy_from(self.dense_out)
        record |= {"block": index, "seconds": time.perf_counter() - started}
        errors = " / ".join("-" if e is None else f"{e:.4f}" for e in record["errors"])
        self.progress.step(f"layer {index}: {record['option']}, error {errors}")
        return record

    def _published(self, site: Site) -> dict[str, Any]:
        with self.walk.layer(site.index) as layer:
            self.walk.advance(layer, site.kwargs, self.dense, self.dense_out)
        deleted = deletion(site)
        stand_in, distances = fit_published(site, self.pairs, self.kept)
        self._take(site, stand_in)
        chosen = Choice(deleted, stand_in, (deleted, stand_in))
        return {**chosen.record, "why": "as published", "distances": distances}

    def _best(self, site: Site) -> dict[str, Any]:
        candidates = []
        with self.walk.layer(site.index) as layer:
            self.walk.advance(layer, site.kwargs, self.dense, self.dense_out)
            structure = self.opening.structures[site.index]
            writers = fits.writers_of(self.walk, layer, structure, site.kwargs, site.dense_in)
            candidates.append(deletion(site))
            if "own" in self.config.replace:
                candidates.append(fits.fit_own(site, layer, structure))
        fold = self._fold(site)
        if fold is not None:
            candidates.append(fold)
        free = choose(candidates[:1] + candidates[-1:]).free
        if "map" in self.config.replace:
            ahead = self.folded if free.option == "fold" else self.own
            if (mapped := fit_map(site, ahead)) is not None:
                candidates.append(mapped)
        candidates += self._shared(site, writers)
        chosen = choose(candidates)
        record = chosen.record
        if chosen.free.option == "fold" and not (chosen.paid and chosen.paid.is_layer):
            self._take_fold(chosen.free)
        if chosen.paid is not None:
            stand_in = chosen.paid
            if self.config.recover:
                stand_in, record["recovery"] = recovered(site, stand_in, self.own, self.config)
                record["errors"] = stand_in.errors
            self._take(site, stand_in)
        return record

    def _shared(self, site: Site, writers: tuple[str, str] | None) -> list[StandIn]:
        """The options that borrow another layer's weights."""
        wanted = [name for name in ("shared", "svd") if name in self.config.replace]
        sources = fits.sources_of(site, self.kept)[: fits.NEIGHBOURS]
        if not wanted or writers is None or not sources:
            return []
        source = min(sources, key=lambda j: fits.gain_error(site, j, writers))
        fit = {"shared": fits.fit_shared, "svd": fits.fit_svd}
        return [fit[name](site, source, writers) for name in wanted]

    def _fold(self, site: Site) -> StandIn | None:
        """The fold into the layer that stays, measured; None where there can be none."""
        position = self.positions[-1]
        if self.linear is None or len(self.positions) > 1 or position.maps:
            return None
        difference = fit_fold(site, self.caught, self.own)
        if difference is None:
            return None
        fold = folded(site, position.origin, self.linear, position.tensors, difference)
        self.folded, self.caught_folded = self._store("folded"), self._store("caught folded")
        values = {name: value.float() for name, value in fold.tensors.items()}
        with self.walk.layer(position.origin) as layer:
            self._run_caught(
                with_parameters(layer, values), self.kwargs[position.origin], self.folded,
                self.caught_folded,
            )  # fmt: skip
        return with_errors(fold, site.measure("fold", None, self.folded))

    def _take_fold(self, fold: StandIn) -> None:
        self.positions[-1].tensors |= fold.tensors
        self.own.copy_from(self.folded)
        self.caught.copy_from(self.caught_folded)

    def _take(self, site: Site, stand_in: StandIn) -> None:
        """Puts a stand-in in its place and runs the compressed path through it."""
        if stand_in.option == "map":
            self.positions[-1].maps.append(stand_in.tensors)
            self.walk.advance(map_module(stand_in.tensors), {}, self.own, self.own)
            return
        self.positions.append(Position(site.index, stand_in.block, stand_in.tensors))
        self.positions[-1].advance(self.walk, self.kwargs, self.own, self.own)
