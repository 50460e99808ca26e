"""Layers repeated, with adapters of their own, for further training.

A repetition shares its layer's weights. The gains of the linears that write to the residual stream,
and the outer factors of all adapters, are zero, so it adds zero: the model that is written computes
what the dense one does, bit for bit. All else is as in the layer, and inner factors are random, so
gains and outer factors have gradients from the first step on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rsprune.blocks import LayerStructure
from rsprune.config import Config
from rsprune.depth.plan import Opened
from rsprune.errors import UsageError
from rsprune.flexi.positions import Position
from rsprune.flexi.site import fill
from rsprune.layer_path import run_layer, twin
from rsprune.replaced import Block
from rsprune.replaced_layers import install_block, linears_of
from rsprune.skeleton import Skeleton


def repeated(layers: int, count: int) -> list[int]:
    """Which of `layers` layers are repeated: `count` of them, evenly spread."""
    return [(2 * place + 1) * layers // (2 * count) for place in range(count)]


def extended(opened: Opened, config: Config) -> Iterator[list[Position]]:
    """Yields every layer, as a unit, with its repetition where it has one."""
    chosen = repeated(len(opened.skeleton.layers), config.extend)
    for index, structure in enumerate(opened.opening.structures):
        unit = [Position(index)]
        if index in chosen:
            unit.append(repetition(opened.skeleton, index, structure, config))
        yield unit


def check_extension(opened: Opened, config: Config) -> None:
    """Tries a repetition out on noise; reads one layer.

    Raises:
        UsageError: its output is not its input, bit for bit.
    """
    skeleton = opened.skeleton
    index = repeated(len(skeleton.layers), config.extend)[0]
    made = repetition(skeleton, index, opened.opening.structures[index], config)
    layer = twin(skeleton.layers[index])
    skeleton.load_layer(index)
    try:
        install_block(layer, made.block, skeleton.layers[index], tied=True)
        fill(layer, made.tensors)
        noise = torch.Generator().manual_seed(0)
        shape = (1, max(config.text_tokens, config.seq_len), skeleton.channels)
        hidden = torch.randn(shape, generator=noise).to(skeleton.device)
        with torch.no_grad():
            output = run_layer(layer, hidden, opened.stream.kwargs(index))
    finally:
        skeleton.drop_layer(index)
    if not torch.equal(output, hidden):
        raise UsageError(
            f"option extend: layer {index} with nothing to add must hand its input through, "
            "which this architecture's layers do not do (they normalise their output)"
        )


def repetition(
    skeleton: Skeleton, index: int, structure: LayerStructure, config: Config
) -> Position:
    """Layer `index` again, adding nothing yet; deterministic in the configuration's seed."""
    layer = skeleton.layers[index]
    generator = torch.Generator().manual_seed(config.seed * len(skeleton.layers) + index)
    linears, writers = linears_of(layer), writing(structure)
    tensors: dict[str, Tensor] = {}
    for name, _ in layer.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner in linears and leaf == "weight":
            continue
        tensors[name] = skeleton.stored(skeleton.layer_name(index, name))
        if owner in writers:
            tensors[name].zero_()
    ranks = {}
    for name, linear in linears.items():
        rank = ranks[name] = min(config.rank, linear.in_features, linear.out_features)
        dtype = skeleton.stored_dtype(skeleton.layer_name(index, f"{name}.weight"))
        inner = torch.randn(rank, linear.in_features, generator=generator)
        tensors[f"{name}.adapter.lora_A.weight"] = (inner / linear.in_features**0.5).to(dtype)
        outer = torch.zeros(linear.out_features, rank, dtype=dtype)
        tensors[f"{name}.adapter.lora_B.weight"] = outer
    for name in writers:
        dtype = tensors[f"{name}.adapter.lora_B.weight"].dtype
        tensors[f"{name}.gain"] = torch.zeros(linears[name].out_features, dtype=dtype)
    return Position(index, Block(source=index, ranks=ranks, gains=writers), tensors)


def writing(structure: LayerStructure) -> list[str]:
    """The linears that write to the residual stream: the last of each child, and of the layer."""
    names = [replay.linear for replay in structure.replays]
    return names + [n for n in structure.groups[-1].linears[-1:] if n not in names]
