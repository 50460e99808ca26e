"""Streaming calibration of one decoder layer: its windows go in, the sums of each group come out.

Two paths at most: *dense* (the original weights) and *own* (the weights as compressed so far).

    propagate=model, target=own     own path alone: Grams of its inputs, then its output
    propagate=layer                 both paths start from the dense hidden states, and only the
                                    dense output goes on; decoder layers are independent
    target=dense                    sums are corrected: they hold what differs between the paths
    true_sequential                 groups one after another, each on what the pruned ones give

A layer's experts come one after another in any case; see `experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsprune import _core
from rsprune.blocks import Group, LayerStructure, Stage
from rsprune.checkpoint import TORCH_DTYPES, as_stored
from rsprune.clip import clip_tokens
from rsprune.config import Config
from rsprune.errors import RspruneError
from rsprune.experts import RoutedInputs
from rsprune.layer_path import LayerPath, as_rows, twin
from rsprune.methods.base import Inputs
from rsprune.pool import TensorPool
from rsprune.timing import Timing
from rsprune.tune import LayerTuner, Tuned
from rsprune.windows import Split, Windows


@dataclass
class GroupStatistics:
    """Sums of one group of linears, over calibration windows and over held-out windows."""

    calibration: _core.Statistics
    heldout: _core.Statistics | None

    @classmethod
    def empty(
        cls, width: int, split: Split, *, corrected: bool, spill: Path | None = None
    ) -> GroupStatistics:
        """Sums of nothing; with `spill`, a folder, in files that have no name."""

        def sums() -> _core.Statistics:
            return _core.Statistics(width, corrected=corrected, spill=spill)

        return cls(sums(), sums() if split.heldout else None)


@dataclass
class LayerJob:
    """One decoder layer on its way through a run.

    Attributes:
        layer: the materialised layer with its dense weights.
        structure: what `blocks.watch` saw in it.
        kwargs: the keyword arguments that the model gives to it.
        inputs: which inputs the method is run on.
        store: makes room for hidden states: `store(kind, channels)`.
        pool: lends buffers for pruned weights.
        where: how errors call this layer.
        tuned: whether the layer will be tuned, which takes both paths.
        spill_sums: a folder for sums that are not to be in memory.
    """

    layer: nn.Module
    structure: LayerStructure
    kwargs: dict[str, Any]
    inputs: Inputs
    split: Split
    threads: int
    store: Callable[[str, int], Windows]
    pool: TensorPool
    where: str
    timing: Timing
    tuned: bool = False
    spill_sums: Path | None = None

    def groups(self, dense: Windows, own: Windows) -> Iterator[tuple[Group, GroupStatistics]]:
        """Yields every group with its sums, in order of use; experts last unless sequential.

        The caller gives the group's new weights to `set_weight` before it asks for the next one.
        """
        self.open(dense, own)
        stages = self.structure.stages(sequential=self.inputs.true_sequential)
        for number, stage in enumerate(stages):
            with self.timing.stage("calibrate"):
                statistics = self._collect(stage, first=number == 0)
            for group in stage.groups:
                yield group, statistics.pop(group)

    def set_weight(self, linear: str, weight: NDArray[Any], dtype: str) -> NDArray[Any]:
        """Lets the own path run with a pruned weight [outputs, inputs], exactly as it is stored.

        Returns:
            The weight in the path's memory where there is one: `weight` need not be kept.
        """
        if self._own is None:
            return weight
        torch_dtype = TORCH_DTYPES[dtype]
        held = self._own.set_weight(linear, torch.from_numpy(weight).view(torch_dtype))
        return as_stored(held, torch_dtype)

    def replay(self, stored: Iterable[tuple[str, Tensor]]) -> None:
        """Runs the layer as it was run before, with the parameters that it was stored with.

        Both paths give the bits that they gave then; nothing is summed, solved or tuned.

        Args:
            stored: name and value as stored of all parameters of the compressed layer, each made
                when it is taken; none is where only the dense layer runs.
        """
        with self.timing.stage("replay"):
            if self._dense is not None:
                for window in range(self.split.count):
                    self._next.put(window, self._dense.output(window))
            if self.inputs.propagate == "model":
                assert self._own is not None
                self._own.put_parameters(stored)

    def tune(self, dtypes: dict[str, torch.dtype], config: Config) -> Tuned:
        """Fits the compressed layer to the dense one's output; the own path goes on with it.

        Args:
            dtypes: stored type of every parameter that may change, by its name in the layer.
            config: the tuning options.
        """
        assert self._own is not None
        with self.timing.stage("tune"):
            tuner = LayerTuner(
                self._own.layer, self.kwargs, self._own.hidden, self.outputs, self.split, dtypes,
                config, self.threads,
            )  # fmt: skip
            tuned = tuner.run()
            self._own.put_parameters(tuned.values.items())
        return tuned

    def advance(self) -> tuple[Windows, Windows]:
        """The next layer's inputs on the dense and on the own path."""
        with self.timing.stage("propagate"):
            if self.inputs.propagate == "model":
                assert self._own is not None
                for window in range(self.split.count):
                    self._own.hidden.put(window, self._own.output(window))
        for path in (self._dense, self._own):
            if path is not None:
                path.close()
        if self._dense is None:
            assert self._own is not None
            return self._own.hidden, self._own.hidden
        if self.inputs.propagate == "layer":
            return self._next, self._next
        assert self._own is not None
        return self._next, self._own.hidden

    @property
    def outputs(self) -> Windows:
        """The dense layer's outputs, once the first groups have been asked for."""
        return self._next

    @property
    def passes(self) -> float:
        """Linears run, weighted by size, in whole passes over all windows."""
        return sum(path.passes for path in (self._dense, self._own) if path is not None)

    @property
    def needs_dense(self) -> bool:
        """Whether the dense layer runs."""
        return self.inputs.needs_dense or self.tuned

    @property
    def needs_own(self) -> bool:
        """Whether the layer as compressed so far runs."""
        return self.inputs.propagate == "model" or self.inputs.true_sequential or self.tuned

    def open(self, dense: Windows, own: Windows) -> None:
        """Begins: `groups` does so by itself, `replay` wants it done."""
        needs_dense, needs_own = self.needs_dense, self.needs_own
        layer = twin(self.layer) if needs_dense else self.layer  # before a path hooks into it
        self._dense = self._path("dense", self.layer, dense, None) if needs_dense else None
        pool = self.pool if needs_dense else None
        self._own = self._path("own", layer, own, pool) if needs_own else None
        self._same_start = needs_dense and dense is own
        if needs_dense:
            self._next = self.store("next", dense.channels)

    def _path(
        self, kind: str, layer: nn.Module, hidden: Windows, pool: TensorPool | None
    ) -> LayerPath:
        def cache(linear: str, width: int) -> Windows:
            return self.store(f"{kind} {linear}", width)

        keeps = cache if self.inputs.true_sequential else None
        routed = self.routed(kind, hidden)
        return LayerPath(layer, self.structure, self.kwargs, hidden, keeps, pool, routed)

    def routed(self, kind: str, hidden: Windows) -> RoutedInputs | None:
        """Room for what enters the layer's experts on a path; None where it has none."""
        if self.structure.experts is None:
            return None
        return RoutedInputs(self.store(f"{kind} experts", hidden.channels))

    def _collect(self, stage: Stage, *, first: bool) -> dict[Group, GroupStatistics]:
        unpruned = first or not self.inputs.true_sequential
        alike = self._own is None or (unpruned and self._same_start)
        corrected = self.inputs.target == "dense" and not alike
        statistics = {
            group: GroupStatistics.empty(
                group.width, self.split, corrected=corrected, spill=self.spill_sums
            )
            for group in stage.groups
        }
        for window in range(self.split.count):
            own = {} if alike else self._own_inputs(window, stage)
            dense = self._dense_inputs(window, stage, first=first, alike=alike, needed=corrected)
            own = dense if alike else own
            for group in stage.groups:
                reference = None
                if corrected:
                    reference = torch.lerp(own[group], dense[group], self.inputs.correction)
                self._add(statistics[group], group, window, own[group], reference)
        return statistics

    def _dense_inputs(
        self, window: int, stage: Stage, *, first: bool, alike: bool, needed: bool
    ) -> dict[Group, Tensor]:
        """Inputs in the dense layer; its output is taken along in the first stage.

        Tokens that are compared with those of the own path are those that its router chose.
        """
        if self._dense is None:
            return {}
        if first:
            caught, output = self._dense.inputs_and_output(window, stage)
            self._next.put(window, output)
            return caught
        if alike:
            return self._dense.inputs(window, stage)
        if not needed:
            return {}
        assert self._own is not None
        numbers = self._own.routing(window) if stage.of_expert else None
        return self._dense.inputs(window, stage, numbers)

    def _own_inputs(self, window: int, stage: Stage) -> dict[Group, Tensor]:
        assert self._own is not None
        return self._own.inputs(window, stage)

    def _add(
        self, statistics: GroupStatistics, group: Group, window: int, own: Tensor,
        dense: Tensor | None,
    ) -> None:  # fmt: skip
        held_out = window >= self.split.calibration
        sums = statistics.heldout if held_out else statistics.calibration
        assert sums is not None
        own, dense = clip_tokens(own, dense, self.inputs.clip_tokens)
        try:
            sums.add(as_rows(own), None if dense is None else as_rows(dense), threads=self.threads)
        except ValueError as error:
            inputs = f"{self.where}, inputs of {group.linears[0]}, window {window}"
            raise RspruneError(f"{inputs}: {error}") from None
