"""A linear whose weight stays packed in memory.

    y = x W^T + b        with W unpacked at the moment of the product

Its parameters are the parts of the packed weight, under their names on disk and in their stored
types whatever the model is cast to: they are bits, and a scale that is rounded is another weight.

`compute` says how the product is made. `exact` unpacks the weight and multiplies as torch does: the
same bits as the dense checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rsprune.checkpoint import TORCH_DTYPES, as_stored
from rsprune.errors import RspruneError
from rsprune.packing import PackedWeight

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
        self.compute = compute
        self.out_features, self.in_features = packed.shape
        for part, dtype, shape in packed.layout:
            empty = torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta")
            self.register_parameter(part, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", bias)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors of the format."""
        return {part: self.get_parameter(part) for part, _, _ in self.packed.layout}

    def set_parts(self, values: Mapping[str, Tensor]) -> None:
        """Takes the parts as they are stored, on the devices of the present ones."""
        for part, present in self.parts.items():
            value = values[part].to(present.device)
            setattr(self, part, nn.Parameter(value, requires_grad=False))

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
        if not (torch.is_grad_enabled() and input.requires_grad):
            return COMPUTE[self.compute](self, input)
        if self.training:
            raise RuntimeError(NO_GRADIENT)
        result: Tensor = _NoGradient.apply(input, self)
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
    def forward(ctx: Any, input: Tensor, linear: PackedLinear) -> Tensor:
        return COMPUTE[linear.compute](linear, input)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(NO_GRADIENT)


def _exact(linear: PackedLinear, input: Tensor) -> Tensor:
    """The bits of the dense checkpoint."""
    return nn.functional.linear(input, linear.weight.to(input.dtype), linear.bias)


COMPUTE: dict[str, Callable[[PackedLinear, Tensor], Tensor]] = {"exact": _exact}
"""Mode -> the product."""
