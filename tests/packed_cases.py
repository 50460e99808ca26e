"""Weights of every packed format, and the golden file that holds some of them with their bytes.

    python tests/packed_cases.py        writes tests/golden/packed.json anew

The bytes come from the NumPy twin, not from the packer that is tested.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from rsprune.reference import pack as twin

GOLDEN = Path(__file__).parent / "golden" / "packed.json"
WORDS: dict[str, Any] = {"F32": np.uint32, "BF16": np.uint16, "F16": np.uint16}
FORMATS = ("keep-of 2:4", "keep-of 4:8", "keep-of 1:16", "keep-of 4:4", "bitmap", "signs 2:8",
           "signs 3:8", "signs 3:4", "signs 4:8", "signs 8:8", "signs 1:4")  # fmt: skip


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers that `dtype` holds, as its bits."""
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    return bits if dtype == "F32" else (bits >> 16).astype(np.uint16)


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    wide = bits if dtype == "F32" else bits.astype(np.uint32) << 16
    return wide.view(np.float32)


def sign_bit(dtype: str) -> int:
    return 1 << (31 if dtype == "F32" else 15)


def half_scale(dtype: str) -> Any:
    return lambda bits: from_bits(bits, dtype).astype(np.float16).view(np.uint16)


def twin_parts(weight: np.ndarray, form: str, dtype: str) -> dict[str, np.ndarray]:
    return twin.pack(weight, form, sign_bit(dtype), half_scale(dtype))


def as_core(weight: np.ndarray, dtype: str) -> np.ndarray:
    """Bits as `_core` takes them."""
    return weight.view(np.float32) if dtype == "F32" else weight


def weight_of(form: str, dtype: str, rows: int, groups: int, seed: int) -> tuple[np.ndarray, str]:
    """Random bits of a format, and its full name; -0, NaN and infinities among the values."""
    generator = np.random.default_rng(seed)
    name, _, argument = form.partition(" ")
    keep, of = map(int, argument.split(":")) if argument else (1, 3)  # bitmap: any columns
    shape = (rows, groups, of)
    kept = generator.random(shape).argsort(axis=-1) < keep
    if name == "signs":
        scales = generator.choice([0.0, 0.5, 0.625, 3.0], (rows, groups * of // 256 + 1))
        signs = np.where(generator.random(shape) < 0.5, -1.0, 1.0).reshape(rows, -1)
        scaled = signs * scales[:, np.arange(groups * of) // 256]
        values = np.where(kept.reshape(rows, -1) & (scaled != 0), scaled, 0.0)
        return to_bits(values, dtype), form
    word = WORDS[dtype]
    bits = generator.integers(0, np.iinfo(word).max, shape, dtype=word, endpoint=True)
    bits[generator.random(shape) < 0.1] = sign_bit(dtype)
    bits = np.where(kept & (generator.random(shape) < 0.9), bits, 0).astype(word).reshape(rows, -1)
    return bits, f"bitmap {np.count_nonzero(bits)}" if name == "bitmap" else form


def golden() -> list[dict[str, Any]]:
    cases = []
    for number, form in enumerate(FORMATS):
        dtype = list(WORDS)[number % 3]
        groups = 35 if form == "signs 2:8" else 5
        weight, full = weight_of(form, dtype, 3, groups, seed=number)
        parts = twin_parts(weight, full, dtype)
        hexed = {part: np.ascontiguousarray(v).tobytes().hex() for part, v in parts.items()}
        case = {"format": full, "dtype": dtype, "shape": list(weight.shape)}
        cases.append(case | {"weight": weight.tobytes().hex(), "parts": hexed})
    return cases


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(case) for case in golden())
    GOLDEN.write_text(f"[\n{lines}\n]\n")
