"""Finds, by watching one short run, what a decoder layer is made of.

Discovery instead of tables: the linears of a layer, their order, and which of them receive the
same input tensor are seen by hooks while the layer runs on `meta` (shapes only, no weights). An
architecture that transformers learns tomorrow therefore needs no change here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rsprune.errors import UsageError
from rsprune.experts import Experts


class StopForwardError(Exception):
    """Raised by hooks to end a forward whose rest is not needed."""


@dataclass(frozen=True)
class Group:
    """Linears of one layer that share their input.

    Attributes:
        linears: module names inside of the layer, in order of use.
        width: input channels.
        expert: the number of the expert that they lie in; None outside of experts.
    """

    linears: tuple[str, ...]
    width: int
    expert: int | None = None


@dataclass(frozen=True)
class Replay:
    """A child of the layer whose output is the output of its last linear.

    Once that linear's input is known for a window, the child need not run again: its output is
    one product away. `extras` is how many further (None) values the child returns.
    """

    child: str
    linear: str
    extras: int | None


@dataclass(frozen=True)
class Stage:
    """Groups whose sums are in memory at the same time.

    Attributes:
        ahead: whether what enters the layer's experts is noted on the way, for later stages.
    """

    groups: tuple[Group, ...]
    ahead: bool = False

    @property
    def of_expert(self) -> bool:
        """Whether all of it lies in one expert."""
        return any(group.expert is not None for group in self.groups)


@dataclass(frozen=True)
class LayerStructure:
    """What was seen in one decoder layer; `experts` is the module of its experts, if it has any."""

    groups: tuple[Group, ...]
    replays: tuple[Replay, ...]
    returns_tuple: bool
    experts: str | None = None

    def stages(self, *, sequential: bool) -> Iterator[Stage]:
        """The order in which sums are collected: one expert at a time, the rest before.

        Args:
            sequential: group after group. Otherwise all inputs are those that the layer has before
                any of it is pruned; so what enters the experts is noted in the first stage.
        """
        if sequential:
            yield from (Stage((group,)) for group in self.groups)
            return
        for expert, groups in itertools.groupby(self._shared_first(), lambda g: g.expert):
            yield Stage(tuple(groups), ahead=expert is None and self.experts is not None)

    def _shared_first(self) -> list[Group]:
        return sorted(self.groups, key=lambda g: -1 if g.expert is None else g.expert)


@dataclass
class _Watcher:
    layer: nn.Module
    order: list[tuple[str, Tensor]] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    replays: list[Replay] = field(default_factory=list)

    def hooks(self) -> list[Any]:
        handles = []
        for name, module in self.layer.named_modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_hook(self._linear(name)))
        for name, child in self.layer.named_children():
            if not isinstance(child, nn.Linear):
                handles.append(child.register_forward_hook(self._child(name)))
        return handles

    def _linear(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if name in self.outputs:
                raise UsageError(f"{name}: expected one call a layer, found a second one")
            self.order.append((name, args[0]))
            self.outputs[name] = output

        return hook

    def _child(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first, *rest = output if isinstance(output, tuple) else (output,)
            last = self.order[-1][0] if self.order else ""
            inside = last.startswith(f"{name}.")
            if inside and first is self.outputs[last] and all(item is None for item in rest):
                extras = len(rest) if isinstance(output, tuple) else None
                self.replays.append(Replay(name, last, extras))

        return hook


def watch(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> LayerStructure:
    """Runs `layer` (on meta) once and says what it is made of.

    Args:
        layer: a decoder layer with all parameters on `meta`.
        hidden: [1, tokens, channels], any device.
        kwargs: the keyword arguments that the model gives to this layer.

    Raises:
        UsageError: the layer holds no `nn.Linear`, or uses one of them twice.
    """
    watcher = _Watcher(layer)
    handles = watcher.hooks()
    buffers = _move_buffers(layer, torch.device("meta"))
    try:
        with torch.no_grad():
            output = layer(_to_meta(hidden), **tree_map(_to_meta, kwargs))
    finally:
        for handle in handles:
            handle.remove()
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
    if not watcher.order:
        kind = type(layer).__name__
        raise UsageError(f"{kind}: expected torch.nn.Linear modules in a decoder layer, found none")
    experts = next((n for n, module in layer.named_modules() if isinstance(module, Experts)), None)
    groups = _group(watcher.order, f"{experts}.")
    return LayerStructure(groups, tuple(watcher.replays), isinstance(output, tuple), experts)


def _group(order: list[tuple[str, Tensor]], experts: str) -> tuple[Group, ...]:
    """Linears by the identity of their input; all inputs are alive, so identities are unique."""
    members: dict[int, list[str]] = {}
    widths: dict[int, int] = {}
    for name, tensor in order:
        members.setdefault(id(tensor), []).append(name)
        widths[id(tensor)] = tensor.shape[-1]
    return tuple(
        Group(tuple(names), widths[key], _expert(names[0], experts))
        for key, names in members.items()
    )


def _expert(linear: str, experts: str) -> int | None:
    """The number of the expert that a linear lies in: `mlp.experts.3.up_proj` in 3."""
    inside = linear.startswith(experts)
    return int(linear.removeprefix(experts).partition(".")[0]) if inside else None


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _move_buffers(layer: nn.Module, device: torch.device) -> list[tuple[nn.Module, str, Tensor]]:
    """Moves the layer's buffers; returns what stood there before."""
    moved = []
    for module in layer.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                moved.append((module, name, buffer))
    for module, name, buffer in moved:
        module._buffers[name] = buffer.to(device)
    return moved
