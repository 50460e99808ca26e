"""A removed layer while stand-ins for it are fitted.

    x_d -> y      the dense layer on the dense model's hidden states: the target is `y`
    x*            what the compressed model has in front of the removed layer
    error         mean over tokens of |stand-in(x*) - y|^2 / |y|^2

Every token counts alike: regressions weigh it by `1 / |y|`, as the error does. Sums over plain
squares would fit the few tokens with massive activations and little else.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsprune.blocks import StopForwardError
from rsprune.depth.walk import Walk
from rsprune.layer_path import run_layer, twin, with_parameters
from rsprune.replaced import Block
from rsprune.replaced_layers import LowRank, install_block, linears_of
from rsprune.windows import Split, Windows

Errors = tuple[float, float | None]
"""On calibration windows, and on held-out ones where there are any."""


@dataclass(frozen=True)
class StandIn:
    """What may stand in for a removed layer.

    Attributes:
        option: delete, fold, map, shared, own or svd.
        block: how its layer differs from an ordinary one; of `map`, the layer before it.
        tensors: as stored, by their names in the layer; of `fold`, in the layer before it.
        errors: of its output, measured with the tensors as they are stored.
    """

    option: str
    block: Block = field(default_factory=Block)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    errors: Errors = (math.inf, None)

    @property
    def nbytes(self) -> int:
        """What it adds to the files."""
        if self.option == "fold":
            return 0  # in place of what is there
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def judged(self) -> float:
        """The error that decides: held-out where there is one."""
        return self.errors[0] if self.errors[1] is None else self.errors[1]

    @property
    def is_layer(self) -> bool:
        """Whether it takes the place of a layer."""
        return self.option in ("shared", "own", "svd")


@dataclass
class Site:
    """See the module's header.

    Attributes:
        index: of the removed layer.
        kwargs: the keyword arguments that the model gives to it.
        dense_in: `x_d`.
        dense_out: `y`.
        own: `x*`.
        rank: of adapters and maps.
    """

    walk: Walk
    index: int
    kwargs: dict[str, Any]
    dense_in: Windows
    dense_out: Windows
    own: Windows
    split: Split
    rank: int

    def weights(self, window: int) -> Tensor:
        """`1 / |y|` [tokens, 1]."""
        y = self.dense_out.get(window, self.device)[0]
        norms: Tensor = y.norm(dim=-1, keepdim=True)
        return 1.0 / norms.clamp_min(torch.finfo(y.dtype).tiny)

    @property
    def device(self) -> torch.device:
        """Where layers run."""
        return self.walk.skeleton.device

    @property
    def windows(self) -> range:
        """All windows, the held-out ones last."""
        return range(self.split.count)

    @property
    def dtype(self) -> torch.dtype:
        """The stored type of the layer's linears: adapters have it, too."""
        skeleton = self.walk.skeleton
        first = next(iter(linears_of(skeleton.layers[self.index])))
        return skeleton.stored_dtype(skeleton.layer_name(self.index, f"{first}.weight"))

    def measure(self, option: str, module: nn.Module | None, source: Windows) -> Errors:
        """The errors of a module on `source`, itself where it is None; windows side by side."""
        kwargs = {} if option == "map" else self.kwargs

        def error(window: int) -> float:
            with torch.no_grad():
                hidden, y = source.get(window, self.device), self.dense_out.get(window, self.device)
                output = hidden if module is None else run_layer(module, hidden, kwargs)
                energy = y.square().sum(-1).clamp_min(torch.finfo(y.dtype).tiny)
                return float(((output - y).square().sum(-1) / energy).mean())

        found = self.walk.each(error, self.windows)
        return mean_errors(found, self.split)


def mean_errors(found: Sequence[float], split: Split) -> Errors:
    """Means over the calibration and over the held-out windows."""
    first, rest = found[: split.calibration], found[split.calibration :]
    return math.fsum(first) / len(first), math.fsum(rest) / len(rest) if rest else None


@dataclass(frozen=True)
class Seen:
    """What passed through a layer for one window; linears' inputs and outputs are [tokens, width].

    Attributes:
        output: of the layer, [tokens, channels]; None where the run ended before.
    """

    window: int
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    output: Tensor | None


def observe(
    walk: Walk,
    layer: nn.Module,
    kwargs: dict[str, Any],
    source: Windows,
    names: Sequence[str],
    windows: Sequence[int],
    *,
    whole: bool = True,
) -> Iterator[Seen]:
    """Runs a layer over windows and yields what goes through some of its modules.

    Args:
        names: of modules in the layer; results of all of them are wanted.
        whole: whether the layer's output is; otherwise it runs no further than the last of `names`.
    """

    def run(window: int) -> Seen:
        copied = with_parameters(layer, {})
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def hook(name: str, given: Tensor, output: Tensor) -> None:
            inputs[name], outputs[name] = (t.reshape(-1, t.shape[-1]) for t in (given, output))
            if not whole and len(outputs) == len(names):
                raise StopForwardError

        for name in names:
            copied.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: hook(name, args[0], output)
            )
        output = None
        with torch.no_grad(), contextlib.suppress(StopForwardError):
            output = run_layer(copied, source.get(window, walk.skeleton.device), kwargs)[0]
        return Seen(window, inputs, outputs, output)

    for start in range(0, len(windows), walk.threads):
        yield from walk.each(run, windows[start : start + walk.threads])


def stored(walk: Walk, index: int, name: str) -> Tensor:
    """Parameter `name` of dense layer `index`, as stored."""
    return walk.skeleton.stored(walk.skeleton.layer_name(index, name))


def weight_of(walk: Walk, index: int, linear: str) -> NDArray[np.float32]:
    """A linear's weight in dense layer `index`, float32 [outputs, inputs]."""
    found: NDArray[np.float32] = stored(walk, index, f"{linear}.weight").float().numpy()
    return found


@contextlib.contextmanager
def built(walk: Walk, index: int, stand_in: StandIn) -> Iterator[nn.Module]:
    """The module that a stand-in for layer `index` is, in memory for the length of the block."""
    with contextlib.ExitStack() as stack:
        if stand_in.option == "map":
            yield map_module(stand_in.tensors)
            return
        layer = twin(walk.skeleton.layers[index])
        chosen = stand_in.block.source
        source = None if chosen is None else stack.enter_context(walk.layer(chosen))
        install_block(layer, stand_in.block, source, tied=True)
        fill(layer, stand_in.tensors)
        yield layer


def map_module(tensors: dict[str, Tensor]) -> nn.Module:
    """`h + B (A h)`."""
    a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
    like = torch.empty(0, device="meta")
    module = LowRank(a.shape[1], b.shape[0], len(a), like=like, residual=True)
    fill(module, tensors)
    return module


def fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts tensors, widened, in the place of parameters; none may be left without a value."""
    for name, value in tensors.items():
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(value.float(), requires_grad=False)
        module.get_submodule(owner)._parameters[leaf] = parameter
    empty = [name for name, p in module.named_parameters() if p.device.type == "meta"]
    assert not empty, f"no values for {empty}"
