"""What a replaced layer computes.

    shared      y = g o (W_j x) + B (A x) + b          W_j: the weight of another layer
    factored    y = B (A x) + b
    mapped      h <- h + B (A h)                       behind a layer
    normalised  h <- (h - mean) / std o gamma          behind a layer, over its channels

`A [rank, inputs]` and `B [outputs, rank]` are called `lora_A` and `lora_B`, as adapters are
everywhere. A shared weight is no parameter of the layer that borrows it: it is in the files once,
in memory once, and moves with the layer that owns it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from rsprune.replaced import Block, Blocks

EPSILON = 1e-6
"""Added to the variance of what is normalised."""


class LowRank(nn.Module):
    """`y = B (A x) + b`; with `residual`, `y = x + B (A x)`."""

    def __init__(
        self, inputs: int, outputs: int, rank: int, *, bias: bool = False, like: Tensor,
        residual: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        made: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.residual = residual
        self.lora_A = nn.Linear(inputs, rank, bias=False, **made)
        self.lora_B = nn.Linear(rank, outputs, bias=bias, **made)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., inputs]."""
        y: Tensor = self.lora_B(self.lora_A(x))
        return x + y if self.residual else y


class SharedLinear(nn.Module):
    """The weight of another linear, with a scale for each output and an adapter.

    Args:
        source: whose weight is used.
        rank: of the adapter; None for none.
        gain: whether outputs of the shared weight are scaled.
        tied: whether the weight becomes a parameter of this module as well, the same object. The
            streaming forward wants it so: layers are in memory one at a time, by parameters.
    """

    def __init__(self, source: nn.Linear, rank: int | None, *, gain: bool, tied: bool) -> None:
        super().__init__()
        like = source.weight
        outputs, inputs = like.shape
        made: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.in_features, self.out_features = inputs, outputs
        self._source = () if tied else (source,)  # in a tuple: not a submodule
        if tied:
            self.weight = like
        self.gain = nn.Parameter(torch.empty(outputs, **made)) if gain else None
        self.bias = None if source.bias is None else nn.Parameter(torch.empty(outputs, **made))
        self.adapter = LowRank(inputs, outputs, rank, like=like) if rank else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., inputs]."""
        weight = self._source[0].weight if self._source else self.weight
        y = nn.functional.linear(x, weight.to(x.device, x.dtype))
        if self.gain is not None:
            y = y * self.gain
        if self.adapter is not None:
            y = y + self.adapter(x)
        return y if self.bias is None else y + self.bias


def install(layers: nn.ModuleList, blocks: Blocks, *, tied: bool) -> None:
    """Makes every layer that `blocks` names what it says; mutates them.

    New parameters lie where the layers' own do, and hold nothing yet.

    Raises:
        ValueError: a layer has no such linear, or not of the shape of its source's.
    """
    originals = list(layers)
    for index, block in blocks.items():
        source = None if block.source is None else originals[block.source]
        try:
            install_block(layers[index], block, source, tied=tied)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from None


def install_block(layer: nn.Module, block: Block, source: nn.Module | None, *, tied: bool) -> None:
    """The same for one layer, whose weights come from `source` where the block has one."""
    linears = linears_of(layer)
    for name in {*block.ranks, *block.gains}:
        if name not in linears:
            raise ValueError(f"expected a linear {name!r}, found {', '.join(linears)}")
    others = {} if source is None else linears_of(source)
    for name, linear in linears.items():
        rank = block.ranks.get(name)
        if source is not None:
            if name not in others or others[name].weight.shape != linear.weight.shape:
                raise ValueError(f"expected a source with a linear {name} of the same shape")
            gain = name in block.gains
            replace(layer, name, SharedLinear(others[name], rank, gain=gain, tied=tied))
        elif rank is not None:
            bias, shape = linear.bias is not None, (linear.in_features, linear.out_features)
            replace(layer, name, LowRank(*shape, rank, bias=bias, like=linear.weight))
    _install_behind(layer, block)


def _install_behind(layer: nn.Module, block: Block) -> None:
    """Maps and the normalisation, which come after the layer's own forward."""
    if not block.maps and not block.normalised:
        return
    like = next(layer.parameters())
    channels = _channels(layer)
    if block.maps:
        layer.maps = nn.ModuleList(
            LowRank(channels, channels, rank, like=like, residual=True) for rank in block.maps
        )
    if block.normalised:
        made: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        layer.output_gamma = nn.Parameter(torch.empty(channels, **made))
    kind: Any = type(layer)
    layer.__class__ = _with_more_behind(kind)


def _channels(layer: nn.Module) -> int:
    """Width of a layer's output: that of what it normalises."""
    norms = (m for m in layer.children() if not list(m.children()) and hasattr(m, "weight"))
    return int(next(norms).weight.shape[0])  # type: ignore[index]


@functools.cache
def _with_more_behind(kind: Any) -> type[nn.Module]:
    """A class that computes what `kind` does and then its maps and its normalisation."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = kind.forward(self, *args, **kwargs)
        if isinstance(found, tuple):
            return (behind(self, found[0]), *found[1:])
        return behind(self, found)

    # Of the same name: transformers knows layers by the names of their classes.
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def behind(layer: Any, hidden: Tensor) -> Tensor:
    """What follows a layer's own forward."""
    for each in getattr(layer, "maps", ()):
        hidden = each(hidden)
    gamma = getattr(layer, "output_gamma", None)
    return hidden if gamma is None else normalised(hidden, gamma)


def normalised(hidden: Tensor, gamma: Tensor) -> Tensor:
    """`(h - mean) / std o gamma` over the channels of each token (published)."""
    centred = hidden - hidden.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    return centred / deviation * gamma


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a layer by name, in the order of its definition."""
    return {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}


def replace(layer: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where `layer` has `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(parent), leaf, module)
