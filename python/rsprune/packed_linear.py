"""A linear whose weight stays packed in memory.

    y = x W^T + b        with W unpacked at the moment of the product, or read as it is packed

Its parameters are the parts of the packed weight, under their names on disk and in their stored
types whatever the model is cast to: they are bits, and a scale that is rounded is another weight.

`compute` says how the product is made:

    float32   our kernels on the packed bytes, activations and sums in float32; where a format has
              no kernel, as in `exact`
    exact     unpacks the weight and multiplies as torch does: the same bits as the dense checkpoint
    int8      signs only: activations in 8 bits, each token by its largest; see `int8_errors`

Two planes of signs (`residual`) are two products that are added, so `float32` has the sum of both
scales where an unpacked weight has that sum rounded to its type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsprune import _core
from rsprune.checkpoint import TORCH_DTYPES, as_stored
from rsprune.errors import RspruneError, UsageError
from rsprune.packing import COMPUTE_MODES, SIGNS, PackedWeight

NO_GRADIENT = (
    "packed linears have no gradients: run under torch.no_grad(), or train the model that "
    "rsprune.load(folder, dequantize=True) gives"
)


class PackedLinear(nn.Module):
    """Stands in for an `nn.Linear`.

    Args:
        packed: how the weight is packed.
        bias: the parameter of the linear that this one replaces.
        compute: a key of `COMPUTE`.
    """

    bias: nn.Parameter | None

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None, compute: str) -> None:
        super().__init__()
        self.packed = packed
        self._matrix: tuple[list[int], _core.PackedMatrix] | None = None
        self.compute = compute
        self.out_features, self.in_features = packed.shape
        self._names = [part for part, _, _ in packed.layout]
        for part, dtype, shape in packed.layout:
            empty = torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta")
            self.register_parameter(part, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", bias)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors of the format."""
        return {part: self.get_parameter(part) for part in self._names}

    def set_parts(self, values: Mapping[str, Tensor]) -> None:
        """Takes the parts as they are stored, on the devices of the present ones."""
        for part, present in self.parts.items():
            value = values[part].to(present.device)
            setattr(self, part, nn.Parameter(value, requires_grad=False))

    @property
    def kind(self) -> str:
        """The format without its numbers."""
        return self.packed.format.split()[0]

    @property
    def compute(self) -> str:
        """How the product is made.

        Raises:
            UsageError: set to what is no mode, or none of this format.
        """
        return self._compute

    @compute.setter
    def compute(self, mode: str) -> None:
        if mode not in COMPUTE_MODES:
            raise UsageError(f"compute: expected one of {', '.join(COMPUTE_MODES)}, found {mode!r}")
        if mode == "int8" and self.kind not in SIGNS:
            raise UsageError(f"compute int8: expected signs, found {self.packed.format}")
        self._compute = mode

    def matrix(self) -> _core.PackedMatrix:
        """The weight for our kernels: the parts in place, and where each row starts.

        Raises:
            RspruneError: the parts are not of their format, or not in the memory of the CPU.
        """
        tensors = [self.get_parameter(part) for part in self._names]
        places = [tensor.data_ptr() for tensor in tensors]
        if self._matrix is None or self._matrix[0] != places:
            if any(tensor.device.type != "cpu" for tensor in tensors):
                device = tensors[0].device
                raise RspruneError(f"compute {self.compute}: expected parts on cpu, found {device}")
            parts = {part: as_stored(value, value.dtype) for part, value in self.parts.items()}
            packed = self.packed
            try:
                matrix = _core.PackedMatrix(parts, packed.dtype, packed.format, packed.shape)
            except ValueError as error:
                raise RspruneError(f"packed linear ({packed.format}): {error}") from None
            self._matrix = places, matrix
        return self._matrix[1]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Parts are overwritten in place: where rows start has to be found anew."""
        self._matrix = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Without what points at this module's own parts, for copies of it."""
        return {**self.__dict__, "_matrix": None}

    @property
    def weight(self) -> Tensor:
        """The dense weight [outputs, inputs] in its own type, made anew each time.

        Raises:
            RspruneError: the parts are not of their format.
        """
        parts = {part: as_stored(value, value.dtype) for part, value in self.parts.items()}
        try:
            weight = torch.from_numpy(self.packed.unpack(parts))
        except ValueError as error:
            raise RspruneError(f"packed linear ({self.packed.format}): {error}") from None
        device = next(iter(self.parts.values())).device
        return weight.view(TORCH_DTYPES[self.packed.dtype]).to(device)

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., inputs] through the linear.

        Raises:
            RuntimeError: a gradient is wanted: now in training mode, else in the backward pass.
        """
        trained = self.bias is not None and self.bias.requires_grad
        if not (torch.is_grad_enabled() and (input.requires_grad or trained)):
            return COMPUTE[self.compute](self, input)
        if self.training:
            raise RuntimeError(NO_GRADIENT)
        result: Tensor = _NoGradient.apply(input, self, self.bias)
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """What `.to`, `.half` and their kin do: parts move, but keep their types."""
        stored = {part: value.detach() for part, value in self.parts.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if any(self.get_parameter(part).dtype != value.dtype for part, value in stored.items()):
            self.set_parts(stored)
        return self

    def extra_repr(self) -> str:
        """What `print(model)` says of it."""
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{features}, format={self.packed.format!r}, compute={self.compute!r}"


class _NoGradient(torch.autograd.Function):
    """A product that can be had but not differentiated."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, linear: PackedLinear, bias: Tensor | None) -> Tensor:
        return COMPUTE[linear.compute](linear, input)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(NO_GRADIENT)


def _exact(linear: PackedLinear, input: Tensor) -> Tensor:
    """The bits of the dense checkpoint."""
    return nn.functional.linear(input, linear.weight.to(input.dtype), linear.bias)


def _by_kernels(mode: str) -> Callable[[PackedLinear, Tensor], Tensor]:
    def product(linear: PackedLinear, input: Tensor) -> Tensor:
        if linear.kind not in KERNELS:
            return _exact(linear, input)
        threads = torch.get_num_threads()
        y = torch.from_numpy(linear.matrix().linear(_tokens(input), mode=mode, threads=threads))
        if linear.bias is not None:
            y += linear.bias
        return y.to(input.dtype).reshape(*input.shape[:-1], linear.out_features)

    return product


def _tokens(input: Tensor) -> NDArray[np.float32]:
    """All tokens [tokens, inputs] in float32."""
    if input.device.type != "cpu":
        raise RspruneError(f"packed linear: expected an input on cpu, found {input.device}")
    x = input.detach().reshape(-1, input.shape[-1]).to(torch.float32)
    return x.contiguous().numpy()


KERNELS = ("keep-of", "bitmap", *SIGNS)
"""Formats whose products need no unpacked weight."""

COMPUTE: dict[str, Callable[[PackedLinear, Tensor], Tensor]] = {
    "float32": _by_kernels("float32"),
    "exact": _exact,
    "int8": _by_kernels("int8"),
}
"""Mode -> the product."""


def set_compute(model: nn.Module, mode: str) -> None:
    """Has all packed linears of `model` multiply in another way; `save_pretrained` keeps it.

    Args:
        model: with packed linears; mutated.
        mode: `float32`, `exact` or `int8`; see `rsprune.packed_linear`.

    Raises:
        UsageError: there is no packed linear, or one that has no such mode. Nothing is changed.
    """
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    if not linears:
        raise UsageError("compute: expected a model with packed linears, found none in it")
    before = [linear.compute for linear in linears]
    try:
        for linear in linears:
            linear.compute = mode
    except UsageError:
        for linear, old in zip(linears, before, strict=True):
            linear.compute = old
        raise
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is not None:
        settings.compute = mode


def int8_errors(model: nn.Module, *args: Any, **inputs: Any) -> dict[str, float]:
    """What mode `int8` would cost: `||y8 - y|| / ||y||` over the tokens that reach each linear.

    Both products have the same input, that of the model in the mode that it is in.

    Args:
        model: not changed.
        args, inputs: what the model is called with, once, without gradients.

    Returns:
        Relative errors by name, of all linears whose weights are packed as signs.
    """
    squares: dict[str, float] = {}
    tokens: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and module.kind in SIGNS:

            def measure(linear: PackedLinear, args: tuple[Tensor, ...], name: str = name) -> None:
                x, threads = _tokens(args[0]), torch.get_num_threads()
                if len(x):  # a linear may be called several times, an expert without tokens
                    error = linear.matrix().int8_error(x, threads=threads)
                    squares[name] = squares.get(name, 0.0) + len(x) * error**2
                    tokens[name] = tokens.get(name, 0) + len(x)

            hooks.append(module.register_forward_pre_hook(measure))
    try:
        with torch.no_grad():
            model(*args, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: math.sqrt(squares[name] / tokens[name]) for name in squares}
