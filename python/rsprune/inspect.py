"""What lies in a checkpoint, tensor by tensor: counted in the bytes, not read from a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsprune.checkpoint import Checkpoint, TensorInfo
from rsprune.report import DENSE

__all__ = ["TensorFacts", "Totals", "inspect", "matrix_view", "totals"]

BLOCK = 1 << 24  # weights looked at together; a multiple of every group length
GROUPS = (4, 8, 16)
BY_CHANCE = 10  # groups that independent zeros would have to break before a pattern is believed

# Bits of each element that are not its sign, for types where -0 is a zero.
_MAGNITUDE = {
    "F16": 0x7FFF,
    "BF16": 0x7FFF,
    "F32": 0x7FFF_FFFF,
    "F64": 0x7FFF_FFFF_FFFF_FFFF,
    "F8_E4M3": 0x7F,
    "F8_E5M2": 0x7F,
}


@dataclass(frozen=True)
class TensorFacts:
    """One tensor as it is stored."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    sparsity: float
    """Zeros over weights."""
    pattern: str | None
    """`2:4` and its kin, `50.0%`, `dense`, or None where the tensor is no matrix.

    A keep-of pattern is the strongest that holds in every group and is no accident: among 95 %
    random zeros some 6:16 holds as well and says nothing.
    """
    bits_per_weight: float
    format: str = DENSE
    """How a packed weight is stored; `nbytes` are those of its parts then."""


@dataclass(frozen=True)
class Totals:
    """A checkpoint as a whole."""

    tensors: int
    weights: int
    zeros: int
    file_bytes: int
    """Length of the weight files, headers included."""
    bits_per_weight: float
    """`file_bytes * 8 / weights`: what the disk really holds."""
    packed_bits: float | None = None
    """The same of the packed weights alone; None where there are none."""


def inspect(folder: str | Path) -> list[TensorFacts]:
    """Facts of every tensor of a checkpoint, in the order of files and of their offsets.

    One tensor at a time is mapped, and its pages are given back; a packed one is unpacked.

    Args:
        folder: local folder with `model.safetensors` or its index.

    Raises:
        UsageError, RspruneError: naming the file or tensor that is missing or broken.
    """
    checkpoint = Checkpoint.open(Path(folder))
    return [_facts(checkpoint, info) for info in checkpoint.tensors.values()]


def totals(folder: str | Path, facts: Iterable[TensorFacts]) -> Totals:
    """Sums over the tensors and the length of their files."""
    facts = list(facts)
    weights = sum(math.prod(fact.shape) for fact in facts)
    zeros = sum(round(fact.sparsity * math.prod(fact.shape)) for fact in facts)
    file_bytes = sum((Path(folder) / file).stat().st_size for file in {f.file for f in facts})
    packed = [fact for fact in facts if fact.format != DENSE]
    bits = sum(fact.nbytes for fact in packed) * 8
    return Totals(
        tensors=len(facts),
        weights=weights,
        zeros=zeros,
        file_bytes=file_bytes,
        bits_per_weight=file_bytes * 8 / max(weights, 1),
        packed_bits=bits / sum(math.prod(fact.shape) for fact in packed) if packed else None,
    )


def _facts(checkpoint: Checkpoint, info: TensorInfo) -> TensorFacts:
    name, shape, weights = info.name, info.shape, math.prod(info.shape)
    columns = shape[-1] if len(shape) == 2 else 0
    zeros, kept = count_zeros(checkpoint.raw(name), info.dtype, weights, columns)
    sparsity, nbytes = zeros / weights if weights else 0.0, checkpoint.stored_bytes(name)
    return TensorFacts(
        name=name,
        file=info.file,
        dtype=info.dtype,
        shape=shape,
        nbytes=nbytes,
        sparsity=sparsity,
        pattern=describe(sparsity, kept, weights) if len(shape) == 2 else None,
        bits_per_weight=nbytes * 8 / weights if weights else 0.0,
        format=checkpoint.packed[name].format if name in checkpoint.packed else DENSE,
    )


def count_zeros(
    raw: NDArray[np.uint8], dtype: str, weights: int, columns: int
) -> tuple[int, dict[int, int]]:
    """Zeros of a tensor, and for each group length that divides a row the most that a group keeps.

    Args:
        raw: the tensor's bytes.
        dtype: its name in the file.
        weights: its number of elements.
        columns: length of a row; 0 for what is no matrix.
    """
    lengths = [of for of in GROUPS if columns and columns % of == 0]
    kept = dict.fromkeys(lengths, 0)
    if weights == 0:
        return 0, kept
    size = raw.nbytes // weights
    zeros = 0
    for start in range(0, weights, BLOCK):
        nonzero = _nonzero(raw[start * size : (start + BLOCK) * size], dtype, size)
        zeros += nonzero.size - int(np.count_nonzero(nonzero))
        for of in lengths:
            kept[of] = max(kept[of], _most_in_a_group(nonzero, of))
    return zeros, kept


def _nonzero(raw: NDArray[np.uint8], dtype: str, size: int) -> NDArray[np.bool_]:
    """Whether each element differs from +0 and -0; bit patterns, so no type is converted."""
    if size not in (1, 2, 4, 8):
        raise ValueError(f"dtype {dtype}: elements of {size} bytes cannot be inspected")
    bits = raw.view(f"<u{size}")
    mask = _MAGNITUDE.get(dtype)
    magnitude = bits if mask is None else bits & bits.dtype.type(mask)
    return np.asarray(magnitude != 0)


def _most_in_a_group(nonzero: NDArray[np.bool_], of: int) -> int:
    """The largest number of True in aligned groups of `of`, by counting bits of whole words."""
    word = np.uint32 if of == 4 else np.uint64
    counts = np.bitwise_count(nonzero.view(word))  # a bool is one byte, 0 or 1
    if of == 16:
        counts = counts[0::2] + counts[1::2]
    return int(counts.max())


def describe(sparsity: float, kept: dict[int, int], weights: int) -> str:
    """The name of a matrix's pattern; see `TensorFacts.pattern`.

    Args:
        sparsity: zeros over weights.
        kept: group length -> the most non-zeros that any group of that length has.
        weights: elements of the matrix.
    """
    holding = [
        (most / of, of, f"{most}:{of}")
        for of, most in kept.items()
        if 0 < most < of and not _accident(sparsity, most, of, weights // of)
    ]
    if holding:
        return min(holding)[2]  # the strongest; of equals (2:4, 4:8) the shorter group
    return f"{sparsity:.1%}" if sparsity > 0.01 else "dense"


def _accident(sparsity: float, most: int, of: int, groups: int) -> bool:
    """Whether zeros thrown independently would keep at most `most` in nearly all the groups, too.

    A pattern that accounts for all the zeros is none: then every group has exactly its number.
    """
    if 1 - most / of >= 0.99 * sparsity:
        return False
    chance = sum(
        math.comb(of, count) * (1 - sparsity) ** count * sparsity ** (of - count)
        for count in range(most + 1, of + 1)
    )
    return chance * groups < BY_CHANCE


def matrix_view(raw: Any, dtype: str, shape: Sequence[int]) -> NDArray[Any]:
    """The bytes of a matrix as `_core` takes it: float32, or uint16 bit patterns of a half type.

    Raises:
        ValueError: for another dtype or for what is no matrix.
    """
    kinds = {"F32": np.float32, "BF16": np.uint16, "F16": np.uint16}
    if dtype not in kinds or len(shape) != 2:
        raise ValueError(f"expected a matrix of {', '.join(kinds)}, found {dtype} {list(shape)}")
    return np.frombuffer(raw, kinds[dtype]).reshape(tuple(shape))
