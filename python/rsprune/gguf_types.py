"""The stored types of a GGUF export: flat float32 values to bytes, and back for the proof.

| type | bits | block | values of a block |
|---|---|---|---|
| F32, F16, BF16 | 32, 16, 16 | 1 | any; F16 and BF16 round to nearest, ties to even |
| TQ1_0 | 1.6875 | 256 | {-a, 0, +a}: 5 digits of base 3 a byte, then a in half precision |
| TQ2_0 | 2.0625 | 256 | {-a, 0, +a}: 2 bits each, then a in half precision |
| Q1_0 | 1.125 | 128 | {-a, +a}: a in half precision, then bit `j % 8` of byte `j // 8`, 1 for +a |

gguf packs all but Q1_0, whose layout is ggml's `block_q1_0`. The packed types are for values that
they hold without loss, and decoding what was encoded is the test: `encode` never approximates.
Blocks lie along the rows, so a matrix whose rows are whole blocks may be cut anywhere between two
blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

__all__ = [
    "PLAIN",
    "TYPES",
    "Bytes",
    "NotExactError",
    "Values",
    "decode",
    "encode",
    "ggml_type",
    "sizes",
]

Values = NDArray[np.float32]
Bytes = NDArray[np.uint8]

PLAIN = ("F32", "F16", "BF16")
"""Types that take any value."""
TYPES = (*PLAIN, "TQ1_0", "TQ2_0", "Q1_0")


class NotExactError(ValueError):
    """Values that a packed type would change."""

    def __init__(self, at: int, found: str) -> None:
        super().__init__(found)
        self.at = at
        """Flat index of the block's first value."""


def ggml_type(kind: str) -> GGMLQuantizationType:
    """The type's number in a file."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind]


def sizes(kind: str) -> tuple[int, int]:
    """Values and bytes of one block."""
    from gguf import GGML_QUANT_SIZES

    values, nbytes = GGML_QUANT_SIZES[ggml_type(kind)]
    return int(values), int(nbytes)


def encode(values: Values, kind: str) -> Bytes:
    """The bytes of whole blocks.

    Args:
        values: flat float32, finite, a multiple of the block.
        kind: one of `TYPES`.

    Raises:
        NotExactError: a packed type cannot hold the values as they are.
    """
    if kind == "F32":
        return values.view(np.uint8)
    if kind == "Q1_0":
        encoded = _encode_signs(values)
    else:
        from gguf.quants import quantize

        with np.errstate(over="ignore"):  # the caller sees infinity in what `decode` returns
            # as one row: gguf takes rows in groups, in a loop of Python
            encoded = quantize(values[None, :], ggml_type(kind))[0].view(np.uint8)
    if kind not in PLAIN:
        _check_exact(values, decode(encoded, kind), kind)
    return encoded


def decode(encoded: Bytes, kind: str) -> Values:
    """The float32 values that a reader of the file sees."""
    if kind == "Q1_0":
        return _decode_signs(encoded)
    from gguf.quants import dequantize

    decoded: Values = dequantize(encoded[None, :], ggml_type(kind))[0]
    return decoded


def _encode_signs(values: Values) -> Bytes:
    blocks = values.reshape(-1, 128)
    scales = np.abs(blocks[:, :1]).astype(np.float16).view(np.uint8)
    signs = np.packbits(blocks > 0, axis=1, bitorder="little")
    return np.concatenate([scales, signs], axis=1).reshape(-1)


def _decode_signs(encoded: Bytes) -> Values:
    blocks = encoded.reshape(-1, 18)
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    return np.where(signs == 1, scales, -scales).reshape(-1)


def _check_exact(values: Values, decoded: Values, kind: str) -> None:
    """Raises for the first block that came back changed (a zero may change its sign)."""
    block = sizes(kind)[0]
    same = (values == decoded).reshape(-1, block).all(axis=1)
    if same.all():
        return
    first = int(np.argmin(same)) * block
    magnitudes = np.unique(np.abs(values[first : first + block]))
    nonzero = magnitudes[magnitudes > 0]
    if len(nonzero) > 1:
        found = f"{len(nonzero)} magnitudes from {nonzero[0]:.6g} to {nonzero[-1]:.6g}"
    elif len(magnitudes) > len(nonzero) and kind == "Q1_0":
        found = "zeros among the signs"
    else:
        found = f"a magnitude of {nonzero[0]!r}, which half precision cannot hold"
    raise NotExactError(first, found)
