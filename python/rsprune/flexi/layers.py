"""Stand-ins that are layers.

shared   another layer's weights; adapters on the two linears that write to the residual stream,
         fitted to what the dense layer writes there:
             T = (x_d + a_d) - x*           after the attention, a_d: what the dense layer adds
             T = y - h                      after the MLP, h: the residual stream in front of it
             g   least squares of T on the shared weight's output W z, channel by channel
             BA  reduced-rank regression of T - g o W z on z
own      its own weights, each replaced by the product of rank r that is closest on its inputs
svd      another layer's weights; on every linear the truncated SVD of W_i - W_j (published),
         and gains as above [ours; the published output normalisation is in `pairs`]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsprune import _core
from rsprune.blocks import LayerStructure
from rsprune.depth.walk import Walk
from rsprune.flexi.maps import Sums, balanced
from rsprune.flexi.site import Site, StandIn, built, observe, stored, weight_of
from rsprune.layer_path import as_rows
from rsprune.replaced import Block
from rsprune.replaced_layers import linears_of
from rsprune.windows import Split, Windows

GAIN_WINDOWS = 4
"""Windows from which gains are taken: one number a channel needs few tokens."""

NEIGHBOURS = 4
"""Kept layers that are tried as a source: the nearest ones."""


def writers_of(
    walk: Walk,
    layer: nn.Module,
    structure: LayerStructure,
    kwargs: dict[str, Any],
    hidden: Windows,
) -> tuple[str, str] | None:
    """The two linears whose outputs a layer adds to its input, and nothing else; tried out.

    None for layers that normalise what they add (Gemma 2 and 3), have experts, or are otherwise.
    """
    names = [replay.linear for replay in structure.replays]
    names += [n for n in structure.groups[-1].linears[-1:] if n not in names]
    if len(names) != 2 or structure.experts is not None:
        return None
    (seen,) = observe(walk, layer, kwargs, hidden, names, [0])
    assert seen.output is not None
    if any(output.shape != seen.output.shape for output in seen.outputs.values()):
        return None
    total = hidden.get(0, seen.output.device)[0] + sum(seen.outputs.values())
    near = torch.allclose(total, seen.output, rtol=1e-3, atol=1e-4 * float(seen.output.abs().max()))
    return (names[0], names[1]) if near else None


def sources_of(site: Site, kept: Sequence[int]) -> list[int]:
    """Kept layers that can lend their weights, the nearest first.

    They must have the same linears, and the same arguments: a layer with a sliding window does not
    do what one without it does.
    """
    walk, layers = site.walk, site.walk.skeleton.layers

    def shapes(index: int) -> dict[str, torch.Size]:
        return {name: linear.weight.shape for name, linear in linears_of(layers[index]).items()}

    types = getattr(walk.skeleton.config.get_text_config(), "layer_types", None)
    fitting = [
        index
        for index in kept
        if shapes(index) == shapes(site.index)
        and (types is None or types[index] == types[site.index])
    ]
    return sorted(fitting, key=lambda index: (abs(index - site.index), index))


def fit_shared(site: Site, source: int, writers: tuple[str, str]) -> StandIn:
    """Option `shared`, with the weights of layer `source`."""
    start = _unfitted(site, source, writers, {}, norms_of=source)
    ranks = {name: _rank(site, name) for name in writers}
    fitted = _fit_writers(site, start, writers, ranks)
    with built(site.walk, site.index, fitted) as module:
        errors = site.measure("shared", module, site.own)
    return StandIn("shared", fitted.block, fitted.tensors, errors)


def gain_error(site: Site, source: int, writers: tuple[str, str]) -> float:
    """How much of what a layer must write is left by another one's output, scaled by channel; over
    a few windows. By this a source is chosen."""
    start = _unfitted(site, source, writers, {}, norms_of=source)
    fitted = _fit_writers(site, start, writers, {})
    with built(site.walk, site.index, fitted) as module:
        some = dataclasses.replace(site, split=Split(_gain_windows(site), 0))
        return some.measure("shared", module, site.own)[0]


def fit_svd(site: Site, source: int, writers: tuple[str, str]) -> StandIn:
    """Option `svd`, with the weights of layer `source`."""
    start = svd_start(site, source, writers)
    fitted = _fit_writers(site, start, writers, {})
    with built(site.walk, site.index, fitted) as module:
        errors = site.measure("svd", module, site.own)
    return StandIn("svd", fitted.block, fitted.tensors, errors)


def svd_start(site: Site, source: int, gains: Sequence[str]) -> StandIn:
    """The published start: `W_j` and the truncated SVD of `W_i - W_j` for every linear."""
    tensors: dict[str, Tensor] = {}
    for name in linears_of(site.walk.skeleton.layers[site.index]):
        difference = weight_of(site.walk, site.index, name) - weight_of(site.walk, source, name)
        left, values, right = _core.truncated_svd(
            difference, "F32", rank=_rank(site, name), threads=site.walk.threads
        )
        outer = torch.from_numpy(left.T * values.astype(np.float32))
        adapter = balanced(outer, torch.from_numpy(right), site.dtype)
        tensors |= {f"{name}.adapter.{leaf}": value for leaf, value in adapter.items()}
    return _unfitted(site, source, gains, tensors, norms_of=site.index)


def fit_own(site: Site, layer: nn.Module, structure: LayerStructure) -> StandIn:
    """Option `own`.

    Args:
        layer: the dense layer, in memory.
        structure: what was seen in it.
    """
    tensors = _other_parameters(site, site.index)
    ranks: dict[str, int] = {}
    first = {group.linears[0]: _core.Regression(group.width, 0) for group in structure.groups}
    windows = range(site.split.calibration)
    for seen in observe(site.walk, layer, site.kwargs, site.own, list(first), windows, whole=False):
        for name, sums in first.items():
            sums.add(as_rows(seen.inputs[name] * site.weights(seen.window)),
                     threads=site.walk.threads)  # fmt: skip
    for group in structure.groups:
        for name in group.linears:
            weight, ranks[name] = weight_of(site.walk, site.index, name), _rank(site, name)
            outer, inner = first[group.linears[0]].factors(
                weight, "F32", rank=ranks[name], threads=site.walk.threads
            )
            factors = balanced(torch.from_numpy(outer.T), torch.from_numpy(inner), site.dtype)
            tensors |= {f"{name}.{leaf}": value for leaf, value in factors.items()}
            if (bias := tensors.pop(f"{name}.bias", None)) is not None:
                tensors[f"{name}.lora_B.bias"] = bias
    stand_in = StandIn("own", Block(ranks=ranks), tensors)
    with built(site.walk, site.index, stand_in) as module:
        errors = site.measure("own", module, site.own)
    return StandIn("own", stand_in.block, tensors, errors)


def _rank(site: Site, linear: str) -> int:
    """The rank of a linear's adapter: what was asked for, but no more than a matrix has."""
    module = linears_of(site.walk.skeleton.layers[site.index])[linear]
    return min(site.rank, module.in_features, module.out_features)


def _gain_windows(site: Site) -> int:
    return min(GAIN_WINDOWS, site.split.calibration)


def _other_parameters(site: Site, index: int) -> dict[str, Tensor]:
    """All of a layer that is no linear's weight (norms, biases), as stored."""
    layer = site.walk.skeleton.layers[index]
    weights = {f"{name}.weight" for name in linears_of(layer)}
    names = (name for name, _ in layer.named_parameters() if name not in weights)
    return {name: stored(site.walk, index, name) for name in names}


def _unfitted(
    site: Site, source: int, gains: Sequence[str], adapters: dict[str, Tensor], *, norms_of: int
) -> StandIn:
    """A layer that shares weights, its gains one."""
    ranks = {
        name.removesuffix(".adapter.lora_A.weight"): len(value)
        for name, value in adapters.items()
        if name.endswith("lora_A.weight")
    }
    tensors = {**_other_parameters(site, norms_of), **adapters}
    for name in gains:
        rows = linears_of(site.walk.skeleton.layers[site.index])[name].out_features
        tensors[f"{name}.gain"] = torch.ones(rows, dtype=site.dtype)
    return StandIn("shared", Block(source=source, ranks=ranks, gains=list(gains)), tensors)


def _fit_writers(
    site: Site, start: StandIn, writers: tuple[str, str], ranks: dict[str, int]
) -> StandIn:
    """Gains of the two writers, one after the other, and adapters of the given ranks on them."""
    fitted = start
    for place, name in enumerate(writers):
        with built(site.walk, site.index, fitted) as module:
            gain = _gain(site, module, writers, place)
            factors = None
            if name in ranks:
                factors = _adapter(site, module, writers, place, gain, ranks[name])
        fitted = _with_writer(site, fitted, name, gain, factors)
    return fitted


def _with_writer(
    site: Site, old: StandIn, name: str, gain: Tensor, factors: dict[str, Tensor] | None
) -> StandIn:
    """A stand-in with the gain of one writer, through which its bias and adapter go as well."""
    tensors, ranks = dict(old.tensors), dict(old.block.ranks)
    tensors[f"{name}.gain"] = gain.to(site.dtype)
    for leaf in ("bias", "adapter.lora_B.weight"):
        if (value := tensors.get(f"{name}.{leaf}")) is not None:
            scale = gain if value.dim() == 1 else gain[:, None]
            tensors[f"{name}.{leaf}"] = (value.float() * scale.cpu()).to(value.dtype)
    if factors is not None:
        tensors |= {f"{name}.adapter.{leaf}": value for leaf, value in factors.items()}
        ranks[name] = len(factors["lora_A.weight"])
    return StandIn(old.option, old.block.model_copy(update={"ranks": ranks}), tensors)


def _written(
    site: Site, module: nn.Module, writers: tuple[str, str], place: int, windows: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yields (window, z, W z, T) of a writer: its input, its output, and what it should be."""
    name = writers[place]
    own = observe(site.walk, module, site.kwargs, site.own, [name], windows, whole=place == 1)
    if place == 1:
        for seen in own:
            assert seen.output is not None
            before = seen.output - seen.outputs[name]
            y = site.dense_out.get(seen.window, site.device)[0]
            yield seen.window, seen.inputs[name], seen.outputs[name], y - before
        return
    with site.walk.layer(site.index) as dense:
        theirs = observe(site.walk, dense, site.kwargs, site.dense_in, [name], windows, whole=False)
        for seen, other in zip(own, theirs, strict=True):
            x_d, x = (s.get(seen.window, site.device)[0] for s in (site.dense_in, site.own))
            target = x_d + other.outputs[name] - x
            yield seen.window, seen.inputs[name], seen.outputs[name], target


def _gain(site: Site, module: nn.Module, writers: tuple[str, str], place: int) -> Tensor:
    """`g` of the module's header."""
    products = squares = torch.zeros(())
    for window, _, base, target in _written(
        site, module, writers, place, range(_gain_windows(site))
    ):
        weights = site.weights(window).square()
        products = products + (weights * base * target).sum(0).double()
        squares = squares + (weights * base * base).sum(0).double()
    ridge = 1e-3 * squares.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (products / (squares + ridge)).float()


def _adapter(
    site: Site, module: nn.Module, writers: tuple[str, str], place: int, gain: Tensor, rank: int
) -> dict[str, Tensor]:
    """`B` and `A` of the module's header; zeros where they do not lower the held-out error."""
    linear = linears_of(site.walk.skeleton.layers[site.index])[writers[place]]
    sums = Sums(site, linear.in_features, linear.out_features)
    stored_gain = gain.to(site.dtype).float()
    for window, z, base, target in _written(site, module, writers, place, site.windows):
        sums.add(window, z, target - stored_gain * base)
    fitted = sums.fit(rank)
    if fitted is None or fitted[0] is None:
        inner = torch.zeros(rank, linear.in_features)
        return balanced(torch.zeros(linear.out_features, rank), inner, site.dtype)
    return balanced(fitted[0], fitted[1], site.dtype)
