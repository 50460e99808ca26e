"""Loss gradients backwards through the layers, with one layer and no weight gradient in memory.

    forward     h_0 -> h_1 -> ... -> h_L           kept: what enters each layer, in files
    top         g_L = dloss / dh_L                 the vocabulary in pieces, as in `head`
    backward    for layers from the last to the first:
                    run the layer again; its linears note inputs A and output gradients D
                    g_l = (d layer / d h)^T g_{l+1}
                    sizes of G = D^T A of both views, added up tile by tile; A and D are dropped

The gradient of a linear's weight is `D^T A`; of two views `D^T A` with the tokens of both stacked
and the signs of one view's `D` turned, which is the difference of their gradients. So what is
measured of it needs no gradient in memory. Norms, biases and other small parameters have theirs
from autograd. Widened weights are made once for the product and once for its gradient, as autograd
would keep a float32 copy of the whole layer from one to the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsprune import _core
from rsprune.depth.walk import Arguments, Walk
from rsprune.errors import RspruneError
from rsprune.head import Tally
from rsprune.layer_path import as_rows, run_layer, with_parameters
from rsprune.stored import StoredLinear
from rsprune.windows import Windows

Caught = dict[str, list[tuple[Tensor, Tensor]]]
"""Linear -> (inputs, output gradients), both [tokens, channels], of every call."""


@dataclass(frozen=True)
class Sizes:
    """Of a gradient `g` of parameters `w`: `sum |g|`, `sum g^2`, `sum |w g|`."""

    l1: float = 0.0
    squares: float = 0.0
    taylor: float = 0.0

    def __add__(self, other: Sizes) -> Sizes:
        squares, taylor = self.squares + other.squares, self.taylor + other.taylor
        return Sizes(self.l1 + other.l1, squares, taylor)


@dataclass
class ViewGradient:
    """One layer's gradients for one view.

    Attributes:
        hidden: with respect to the layer's input, [1, tokens, channels].
        linears: what the weights' gradients are products of.
        direct: parameter name -> gradient, of all that is no linear's weight.
    """

    hidden: Tensor
    linears: Caught = field(default_factory=dict)
    direct: dict[str, Tensor] = field(default_factory=dict)


def view_gradient(
    layer: nn.Module, kwargs: dict[str, Any], hidden: Tensor, above: Tensor
) -> ViewGradient:
    """Runs a layer forward and backward for one view; the layer is not mutated.

    Args:
        layer: materialised.
        kwargs: the keyword arguments that the model gives to it.
        hidden: its input [1, tokens, channels].
        above: the loss gradient of its output.
    """
    weights = {f"{name}.weight" for name, m in layer.named_modules() if isinstance(m, StoredLinear)}
    direct = {
        name: nn.Parameter(parameter.detach())
        for name, parameter in layer.named_parameters()
        if name not in weights
    }
    tapped, inputs = with_parameters(layer, direct), hidden.detach().clone().requires_grad_()
    with _taps(tapped) as caught:
        output = run_layer(tapped, inputs, kwargs)
        found = torch.autograd.grad(output, [inputs, *direct.values()], above, allow_unused=True)
    known = {name: g for name, g in zip(direct, found[1:], strict=True) if g is not None}
    assert found[0] is not None  # a layer's output depends on its input
    return ViewGradient(found[0], caught, known)


@contextlib.contextmanager
def _taps(layer: nn.Module) -> Iterator[Caught]:
    """Lets the linears of a layer note what passes them, for the length of the block.

    A tap knows the linear that it sits on: left there, it would hold all that it noted until the
    interpreter looks for cycles.
    """
    caught = Caught()
    linears = {n: m for n, m in layer.named_modules() if isinstance(m, StoredLinear)}
    for name, linear in linears.items():
        tap = partial(_tapped, linear, caught.setdefault(name, []))
        linear.forward = tap  # type: ignore[method-assign]
    try:
        yield caught
    finally:
        for linear in linears.values():
            del linear.forward


class _Product(torch.autograd.Function):
    """`y = x W^T + b` that notes `x` and `dloss/dy`; `W` is read and widened for either."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        bias: Tensor | None,
        linear: StoredLinear,
        note: Callable[..., None],
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.linear, ctx.note = linear, note
        return nn.functional.linear(inputs, linear.read().to(inputs.device, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,), (delta,) = ctx.saved_tensors, deltas
        rows = delta.reshape(-1, delta.shape[-1])
        ctx.note((inputs.detach().reshape(-1, inputs.shape[-1]), rows))
        bias = rows.sum(0) if ctx.needs_input_grad[1] else None
        return delta @ ctx.linear.read().to(delta.device, delta.dtype), bias, None, None


def _tapped(linear: StoredLinear, calls: list[tuple[Tensor, Tensor]], inputs: Tensor) -> Tensor:
    product: Tensor = _Product.apply(inputs, linear.bias, linear, calls.append)
    return product


def sizes(
    layer: nn.Module, views: list[tuple[float, ViewGradient]], *, squares_only: bool, threads: int
) -> Sizes:
    """Of the gradient `sum sign_v G_v` of all parameters of a layer.

    Args:
        layer: materialised; its weights are what `taylor` multiplies with.
        views: each with its sign.
        squares_only: whether the others need not be known; that may be cheaper.
        threads: of the core.
    """
    total = Sizes()
    for name in views[0][1].linears:
        calls = [(sign, *call) for sign, view in views for call in view.linears[name]]
        if not calls:
            continue  # an expert that no token was sent to
        inputs = np.concatenate([as_rows(a) for _, a, _ in calls])
        deltas = np.concatenate([np.float32(sign) * as_rows(d) for sign, _, d in calls])
        if squares_only:
            found = _core.gradient_squares(deltas, inputs, threads=threads)
            total += Sizes(squares=found)
        else:
            linear = layer.get_submodule(name)
            assert isinstance(linear, StoredLinear)
            weight = _bits(linear.read())
            total += Sizes(*_core.gradient_sizes(deltas, inputs, *weight, threads=threads))
    for name in sorted({name for _, view in views for name in view.direct}):
        value = layer.get_parameter(name)
        nothing = torch.zeros_like(value)
        gradient = sum((sign * v.direct.get(name, nothing) for sign, v in views), nothing).double()
        of_weight = float((value.double() * gradient).abs().sum())
        total += Sizes(float(gradient.abs().sum()), float(gradient.square().sum()), of_weight)
    return total


def _bits(weight: Tensor) -> tuple[NDArray[Any], str]:
    """A weight as the core takes it, and its type."""
    value = weight.detach().cpu()
    if value.dtype in (torch.bfloat16, torch.float16):
        return value.view(torch.uint16).numpy(), "BF16" if value.dtype == torch.bfloat16 else "F16"
    return value.float().numpy(), "F32"


def forward(walk: Walk, kept: list[int], ids: Tensor) -> tuple[list[Windows], Arguments]:
    """Takes windows through the layers `kept`; returns what enters each, and the last one's output.

    Args:
        ids: int64 [windows, tokens].
    """
    states = [walk.store(f"states {place}", *ids.shape) for place in range(len(kept) + 1)]
    kwargs = walk.embed(ids, states[0])
    for place, index in enumerate(kept):
        with walk.layer(index) as layer:
            walk.advance(layer, kwargs[index], states[place], states[place + 1])
    return states, kwargs


def top_gradient(walk: Walk, final: Windows, ids: Tensor, gradients: Windows) -> None:
    """Fills `gradients` with those of each window's mean next-token loss.

        dloss / dz = (softmax(z) - onehot(target)) / tokens,  z the logits

    Twice through the vocabulary, a piece in memory: once for the sum in the softmax.

    Args:
        final: what the last layer gave.
        ids: int64 [windows, tokens + 1].
    """
    tallies = walk.tallies([(final, window) for window in range(len(ids))], ids)
    for window in range(len(ids)):
        gradients.put(window, torch.zeros_like(final.get(window, walk.skeleton.device)))
    with walk.stream.head():
        for piece in walk.head.pieces():

            def add(window: int, piece: range = piece) -> None:
                hidden = final.get(window, walk.skeleton.device)
                part = _piece_gradient(walk, hidden, ids[window][1:], tallies[window], piece)
                gradients.put(window, gradients.get(window, part.device) + part)

            walk.each(add, range(len(ids)))


def _piece_gradient(
    walk: Walk, hidden: Tensor, targets: Tensor, tally: Tally, piece: range
) -> Tensor:
    """What the tokens of a piece of the vocabulary add to the gradient of `hidden`."""
    head, tokens = walk.head, len(targets)
    step = head.chunk if walk.stream.takes_positions else tokens
    total = torch.zeros_like(hidden)
    for start in range(0, tokens, step):
        rows = torch.arange(start, min(start + step, tokens))
        leaf = hidden.detach().clone().requires_grad_()
        logits = walk.stream.logits(leaf, rows.to(hidden.device))
        log_sums = tally.log_sums()[rows].to(logits.device, logits.dtype)
        weight = (logits.detach() - log_sums[:, None]).exp_()
        wanted = targets[rows]
        here = ((wanted >= piece.start) & (wanted < piece.stop)).nonzero()[:, 0]
        weight[here, wanted[here] - piece.start] -= 1.0
        (part,) = torch.autograd.grad(logits, leaf, weight.div_(tokens))
        total += part
    return total


def backward(
    walk: Walk,
    index: int,
    kwargs: dict[str, Any],
    inputs: Windows,
    gradients: Windows,
    measure: Callable[[nn.Module, list[ViewGradient]], tuple[Sizes, ...]],
) -> list[tuple[Sizes, ...]]:
    """Takes gradients down through one layer; returns what `measure` says of each text.

    Args:
        index: of the layer.
        inputs: what enters it; windows `2 t` and `2 t + 1` are the views of text `t`.
        gradients: of its outputs; overwritten with those of its inputs.

    Raises:
        RspruneError: a gradient is not finite.
    """
    device = walk.skeleton.device
    with walk.layer(index) as layer:

        def run(text: int) -> tuple[Sizes, ...]:
            views = []
            for window in (2 * text, 2 * text + 1):
                hidden = inputs.get(window, device)
                above = gradients.get(window, device).clone()  # its place is written to below
                views.append(view_gradient(layer, kwargs, hidden, above))
                gradients.put(window, views[-1].hidden)
            found = measure(layer, views)
            if not all(np.isfinite([size.l1, size.squares, size.taylor]).all() for size in found):
                raise RspruneError(
                    f"layer {index}, text {text}: found gradients that are not finite"
                )
            return found

        return walk.each(run, range(len(inputs) // 2))
