"""Packed weights, bit after bit: the twin of `rust/rsprune-core/src/pack`, beside whose pages it is
to be read.

Weights are arrays [rows, columns] of bits (uint16 or uint32): what these mean matters to `signs`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[Any]
SCALE_COLUMNS = 256


def pack(weight: Bits, form: str, sign_bit: int, half_scale: Any) -> dict[str, Bits]:
    """The parts of `weight`.

    Args:
        weight: bits [rows, columns].
        form: the format's name.
        sign_bit: of a weight.
        half_scale: bits of a magnitude -> the same number as bits of an F16 (`signs` only).
    """
    name, _, argument = form.partition(" ")
    if name == "bitmap":
        return {"values": weight[weight != 0], "mask": rows_of_bits(weight != 0)}
    keep, of = map(int, argument.split(":"))
    groups = weight.reshape(len(weight), -1, of)
    mask = stored_columns(groups, keep)
    values = groups[mask].reshape(len(weight), -1)
    if name == "keep-of":
        return {"values": values, "mask": rows_of_bits(mask.reshape(weight.shape))}
    masks = [m for m in range(1 << of) if m.bit_count() == keep]
    numbers = (mask * (1 << np.arange(of))).sum(-1)
    codes = np.vectorize(masks.index)(numbers)
    width = math.ceil(math.log2(len(masks)))
    parts: dict[str, Bits] = {"positions": rows_of_numbers(codes, width)} if width else {}
    parts["signs"] = rows_of_bits(values & sign_bit != 0)
    blocks = [
        weight[:, i : i + SCALE_COLUMNS] & ~weight.dtype.type(sign_bit)
        for i in range(0, weight.shape[1], SCALE_COLUMNS)
    ]
    parts["scales"] = np.array([half_scale(b.max(axis=1)) for b in blocks], np.uint16).T
    return parts


def unpack(parts: dict[str, Bits], form: str, shape: tuple[int, int], dtype: Any) -> Bits:
    """The weight of `keep-of` or `bitmap` parts, as bits of `dtype`."""
    columns = shape[1]
    mask = np.unpackbits(parts["mask"], axis=1, bitorder="little")[:, :columns].astype(bool)
    weight = np.zeros(shape, dtype)
    weight[mask] = parts["values"].reshape(-1)
    return weight


def stored_columns(groups: Bits, keep: int) -> NDArray[np.bool_]:
    """Non-zeros, and the lowest free columns, so that `keep` of every group are True."""
    mask: NDArray[np.bool_] = groups != 0
    for row, group in itertools.product(*map(range, groups.shape[:2])):
        for column in range(groups.shape[2]):
            if mask[row, group].sum() < keep:
                mask[row, group, column] = True
    return mask


def rows_of_bits(bits: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Every row in bytes, its first bit lowest."""
    return np.packbits(bits, axis=1, bitorder="little")


def rows_of_numbers(numbers: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """Every row in bytes, `width` bits a number, lowest first."""
    bits = numbers[..., None] >> np.arange(width) & 1
    return rows_of_bits(bits.reshape(len(numbers), -1).astype(bool))
