"""Streaming calibration: one decoder layer in memory, its inputs window after window.

A layer is run on up to two paths: *dense* (the original weights) and *own* (the weights as
compressed so far). On each, hooks catch the inputs of the linears that are next to be solved, and
the run ends there. What need not run again is replayed: once the input of a child's last linear is
known (attention, say), the child's output is one product away.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsprune import _core
from rsprune.blocks import Group, LayerStructure, Replay
from rsprune.errors import RspruneError


class Windows:
    """Hidden states of all windows, [count, tokens, channels] float32, in memory or in a file.

    In a file they count as file-backed memory that the system may drop, not as anonymous memory.
    """

    def __init__(self, count: int, tokens: int, channels: int, spill: Path | None = None) -> None:
        shape = (count, tokens, channels)
        size = count * tokens * channels
        if spill is None:
            self._data = torch.empty(shape)
        else:
            flat = torch.from_file(str(spill), shared=True, size=size)
            self._data = flat.reshape(shape)

    def __len__(self) -> int:
        return len(self._data)

    def get(self, window: int, device: torch.device) -> Tensor:
        """[1, tokens, channels] of one window."""
        return self._data[window : window + 1].to(device)

    def put(self, window: int, value: Tensor) -> None:
        """Stores [1, tokens, channels] of one window."""
        self._data[window] = value[0]


class _StopForwardError(Exception):
    """Ends a layer's forward when all wanted inputs are caught."""


class LayerPath:
    """One decoder layer with one set of weights, run over windows.

    Args:
        layer: the materialised layer.
        structure: what `blocks.watch` saw in it.
        kwargs: the keyword arguments that the model gives to this layer.
        hidden: the layer's inputs.
        store: makes room for the cached inputs of replays: `store(channels) -> Windows`.
    """

    def __init__(
        self, layer: nn.Module, structure: LayerStructure, kwargs: dict[str, Any],
        hidden: Windows, store: Any,
    ) -> None:  # fmt: skip
        self.layer = layer
        self.structure = structure
        self.kwargs = kwargs
        self.hidden = hidden
        self.runs = 0
        self._device = next(layer.parameters()).device
        self._store = store
        self._cache: dict[Replay, Windows] = {}
        self._cached: dict[Replay, set[int]] = {}

    def inputs(self, window: int, groups: Sequence[Group]) -> dict[Group, Tensor]:
        """The inputs [tokens, width] of `groups`; the layer runs no further than needed."""
        caught, _ = self._run(window, groups, finish=False)
        return caught

    def inputs_and_output(
        self, window: int, groups: Sequence[Group]
    ) -> tuple[dict[Group, Tensor], Tensor]:
        """The inputs of `groups` and the layer's output [1, tokens, channels]."""
        caught, output = self._run(window, groups, finish=True)
        assert output is not None
        return caught, output

    def output(self, window: int) -> Tensor:
        """The layer's output [1, tokens, channels]."""
        return self.inputs_and_output(window, ())[1]

    def set_weight(self, linear: str, weight: Tensor) -> None:
        """Puts a compressed weight in place of the one that the layer holds."""
        module = self.layer.get_submodule(linear)
        module._parameters["weight"] = nn.Parameter(
            weight.to(self._device, torch.float32), requires_grad=False
        )

    def _run(
        self, window: int, groups: Sequence[Group], *, finish: bool
    ) -> tuple[dict[Group, Tensor], Tensor | None]:
        caught: dict[Group, Tensor] = {}
        output: Tensor | None = None
        self.runs += 1
        with contextlib.ExitStack() as stack:
            replayed = stack.enter_context(self._replays(window))
            for group in self._watched(groups, replayed):
                wanted = None if finish else groups
                stack.enter_context(self._catch(window, group, caught, wanted))
            with torch.no_grad(), contextlib.suppress(_StopForwardError):
                result = self.layer(self.hidden.get(window, self._device), **self.kwargs)
                output = result[0] if isinstance(result, tuple) else result
        return {group: caught[group] for group in groups}, output

    def _watched(self, groups: Sequence[Group], replayed: set[str]) -> list[Group]:
        """The wanted groups, and those whose inputs are worth keeping for a replay."""
        kept = {r.linear for r in self._cacheable() if r.linear not in replayed}
        return [g for g in self.structure.groups if g in groups or kept & set(g.linears)]

    def _cacheable(self) -> list[Replay]:
        """Replays whose cached input is no wider than the hidden states themselves."""
        channels = self.hidden._data.shape[-1]
        widths = {name: g.width for g in self.structure.groups for name in g.linears}
        return [r for r in self.structure.replays if widths[r.linear] <= channels]

    @contextlib.contextmanager
    def _catch(
        self, window: int, group: Group, caught: dict[Group, Tensor],
        wanted: Sequence[Group] | None,
    ) -> Iterator[None]:  # fmt: skip
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught[group] = args[0].reshape(-1, group.width)
            self._keep(window, group, caught[group])
            if wanted is not None and all(g in caught for g in wanted):
                raise _StopForwardError

        first = self.layer.get_submodule(group.linears[0])
        handle = first.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _keep(self, window: int, group: Group, inputs: Tensor) -> None:
        for replay in self._cacheable():
            if replay.linear in group.linears:
                if replay not in self._cache:
                    self._cache[replay] = self._store(group.width)
                    self._cached[replay] = set()
                self._cache[replay].put(window, inputs[None])
                self._cached[replay].add(window)

    @contextlib.contextmanager
    def _replays(self, window: int) -> Iterator[set[str]]:
        """Children whose last linear's input is cached give their output without running."""
        active = [r for r in self._cache if window in self._cached[r]]
        for replay in active:
            cached = self._cache[replay].get(window, self._device)
            child = self.layer.get_submodule(replay.child)
            child.forward = _replayed(self.layer.get_submodule(replay.linear), cached, replay)
        try:
            yield {replay.linear for replay in active}
        finally:
            for replay in active:
                del self.layer.get_submodule(replay.child).forward


def _replayed(linear: nn.Module, cached: Tensor, replay: Replay) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = linear(cached)
        return output if replay.extras is None else (output, *[None] * replay.extras)

    return forward


def twin(layer: nn.Module) -> nn.Module:
    """A second layer that shares all tensors with `layer` until a weight is replaced."""
    memo = {id(tensor): tensor for tensor in [*layer.parameters(), *layer.buffers()]}
    return copy.deepcopy(layer, memo)


@dataclass
class GroupStatistics:
    """The sums of one group of linears: over calibration windows and over held-out windows."""

    calibration: _core.Statistics
    heldout: _core.Statistics | None


@dataclass(frozen=True)
class Split:
    """Which windows no solver sees."""

    count: int
    heldout: frozenset[int]


def empty_statistics(group: Group, split: Split, *, corrected: bool) -> GroupStatistics:
    """Sums of zero for `group`."""
    heldout = _core.Statistics(group.width, corrected=corrected) if split.heldout else None
    return GroupStatistics(_core.Statistics(group.width, corrected=corrected), heldout)


def accumulate(
    statistics: GroupStatistics, window: int, split: Split,
    own: Tensor, dense: Tensor | None, *, where: str, threads: int | None,
) -> None:  # fmt: skip
    """Adds the inputs [tokens, width] of one window to the sums that it belongs to.

    Raises:
        RspruneError: an activation is not finite; names `where` and the window.
    """
    target = statistics.heldout if window in split.heldout else statistics.calibration
    assert target is not None
    try:
        target.add(_rows(own), None if dense is None else _rows(dense), threads=threads)
    except ValueError as error:
        raise RspruneError(f"{where}, window {window}: {error}") from None


def _rows(activations: Tensor) -> Any:
    return activations.detach().to("cpu", torch.float32).contiguous().numpy()
