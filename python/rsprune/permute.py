"""Channels in better company: function-preserving permutations for keep-of patterns (ours).

    down(act(gate(x)) * up(x))   stays the same when rows of gate and up move as columns of down do
    o(attention(.., v(x)))       stays the same when rows of v move as columns of o, in their head

A group of a keep-of pattern then holds other channels; the core's `group_channels` finds an order
that keeps most. The permutation is folded into the stored weights, so the output stays an ordinary
checkpoint. Which linears belong together is tried out, not looked up: a coupling is used only
where the layer's output is the same after a random permutation of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsprune import _core
from rsprune.blocks import LayerStructure, Stage
from rsprune.clip import clip_tokens
from rsprune.experts import ExpertLinear
from rsprune.layer_path import LayerPath, as_rows, run_layer, with_parameters
from rsprune.scratch import Scratch

WINDOWS = 8
"""Calibration windows from which the energies of channels are known well enough."""
TOLERANCE = 1e-3
"""Relative difference of outputs below which a permutation counts as function-preserving."""


@dataclass(frozen=True)
class Coupling:
    """Linears whose rows, and one whose columns, are the same channels.

    Attributes:
        producers: their rows are the channels.
        consumer: its columns are; channel `j` of segment `s` feeds columns `s * repeats ..`.
        segment: channels that must stay together (a head).
        repeats: columns that a channel feeds (query heads that share a value head).
    """

    producers: tuple[str, ...]
    consumer: str
    segment: int
    repeats: int

    def columns(self, order: Tensor) -> Tensor:
        """The order of the consumer's columns that goes with an order of the channels."""
        local = order.reshape(-1, 1, self.segment) % self.segment
        heads = torch.arange(local.shape[0] * self.repeats).reshape(-1, self.repeats, 1)
        return (heads * self.segment + local).reshape(-1)

    def parameters(self, layer: nn.Module) -> Iterator[str]:
        """Names of the parameters that a permutation touches."""
        for linear in self.producers:
            for leaf, _ in layer.get_submodule(linear).named_parameters(recurse=False):
                yield f"{linear}.{leaf}"
        yield f"{self.consumer}.weight"

    def permute(self, name: str, value: Tensor, order: Tensor) -> Tensor:
        """A parameter of `parameters` with its channels in another order."""
        if name == f"{self.consumer}.weight":
            return value[:, self.columns(order)]
        parts = len(value) // len(order)  # a fused gate and up hold the channels twice
        return value.reshape(parts, len(order), -1)[:, order].reshape(value.shape)


def find_couplings(
    layer: nn.Module, structure: LayerStructure, kwargs: dict[str, Any], sample: Tensor
) -> list[Coupling]:
    """The couplings of a materialised layer that hold when tried on `sample` [1, T, C]."""
    heads = (getattr(module, "head_dim", None) for module in layer.modules())
    head = next((size for size in heads if isinstance(size, int)), None)
    with torch.no_grad():
        expected = _output(layer, kwargs, sample)
        holding: dict[str, Coupling] = {}
        for coupling in _candidates(layer, structure, head):
            known = coupling.consumer in holding  # whole widths come first, and are better
            if not known and _holds(layer, coupling, kwargs, sample, expected):
                holding[coupling.consumer] = coupling
    return list(holding.values())


def _candidates(
    layer: nn.Module, structure: LayerStructure, head: int | None
) -> Iterator[Coupling]:
    """Per consumer: all linears of the group before it, or the last one of them head by head."""
    rows = {
        linear: layer.get_submodule(linear).get_parameter("weight").shape[0]
        for group in structure.groups
        for linear in group.linears
    }
    shared = [group for group in structure.groups if group.expert is None]
    for before, after in pairwise(shared):
        for consumer in after.linears[:1] if len(after.linears) == 1 else ():
            last = before.linears[-1]
            if all(rows[linear] in (after.width, 2 * after.width) for linear in before.linears):
                yield Coupling(before.linears, consumer, after.width, 1)
            if head and after.width % rows[last] == 0 and rows[last] % head == 0:
                yield Coupling((last,), consumer, head, after.width // rows[last])


def _holds(
    layer: nn.Module, coupling: Coupling, kwargs: dict[str, Any], sample: Tensor, expected: Tensor
) -> bool:
    generator = torch.Generator().manual_seed(0)
    columns = layer.get_submodule(coupling.consumer).get_parameter("weight").shape[1]
    starts = range(0, columns // coupling.repeats, coupling.segment)
    order = torch.cat([s + torch.randperm(coupling.segment, generator=generator) for s in starts])
    values = {
        name: coupling.permute(name, layer.get_parameter(name), order)
        for name in coupling.parameters(layer)
    }
    found = _output(with_parameters(layer, values), kwargs, sample)
    return float((found - expected).norm()) <= TOLERANCE * float(expected.norm())


def _output(layer: nn.Module, kwargs: dict[str, Any], sample: Tensor) -> Tensor:
    return (
        run_layer(layer, sample, kwargs) - sample
    )  # what the layer adds: the residual stream would hide a difference


def expert_couplings(structure: LayerStructure) -> Iterator[Coupling]:
    """One per expert, whose hidden channels may always change places: `down(act(gate) * up)`."""
    experts = [group for group in structure.groups if group.expert is not None]
    for inner, outer in zip(experts[::2], experts[1::2], strict=True):
        yield Coupling(inner.linears, outer.linears[0], outer.width, 1)


def reorder(
    layer: nn.Module, coupling: Coupling, order: Tensor, scratch: Scratch | None = None
) -> None:
    """Moves the channels of a layer, in place; weights of experts are put in `scratch`."""
    for name in coupling.parameters(layer):
        owner = layer.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, ExpertLinear):
            assert scratch is not None
            moved = coupling.permute(name, owner.read(), order)
            owner.hold(scratch.keep_tensor(moved))
        else:
            value = layer.get_parameter(name)
            value.copy_(coupling.permute(name, value, order))


def consumer_sums(
    path: LayerPath,
    couplings: Sequence[Coupling],
    windows: int,
    threads: int,
    *,
    clip: float,
    spill: Path | None,
) -> dict[str, _core.Statistics]:
    """Sums over the first windows of the inputs of every coupling's consumer."""
    wanted = {coupling.consumer for coupling in couplings}
    groups = [group for group in path.structure.groups if wanted & set(group.linears)]
    sums = {group.linears[0]: _core.Statistics(group.width, spill=spill) for group in groups}
    for window in range(windows):
        for group, caught in path.inputs(window, Stage(tuple(groups))).items():
            rows = as_rows(clip_tokens(caught, None, clip)[0])
            sums[group.linears[0]].add(rows, threads=threads)
    return sums
