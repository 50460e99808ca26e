"""Weights as they lie in a file: float32, or the bits of a half type."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def widen(stored: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    """The values of `stored`: float32 for "F32", bits in uint16 for "BF16" and "F16"."""
    if dtype == "BF16":
        bits = stored.astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    if dtype == "F16":
        return stored.view(np.float16).astype(np.float64)
    return stored.astype(np.float64)


def narrow(values: ArrayLike, dtype: str) -> NDArray[Any]:
    """Finite `values` as `dtype` stores them, float32 rounded to nearest, ties to even."""
    single = np.asarray(values, np.float32)
    if dtype == "BF16":
        bits = single.view(np.uint32)
        half = 0x7FFF + ((bits >> 16) & 1)  # what carries into the upper half from its middle on
        return ((bits + half) >> 16).astype(np.uint16)
    return single.astype(np.float16).view(np.uint16) if dtype == "F16" else single
