"""Packed linears: what a folder says of them, in the `quantization_config` of its config.json.

    "quantization_config": {
        "quant_method": "rsprune", "version": 1, "compute": "float32",
        "linears": {"<linear>": "<format>", ...},
        "dense": {"<linear>": ["<dtype>", [rows, columns]], ...}
    }

A linear's weight `<linear>.weight` is then not in the files, but its parts `<linear>.<part>`. Which
parts a format has, and how large they are, follows from its name and from the weight's type and
shape; the formats are described in `rust/rsprune-core/src/pack`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsprune import _core
from rsprune.errors import RspruneError, UsageError

METHOD = "rsprune"
"""`quant_method` of our folders."""

COMPUTE_MODES = ("float32", "exact", "int8")
"""How a loaded model multiplies; the first is what a new folder says."""

SIGNS = ("signs", "residual")
"""Formats of signs and scales alone, without their numbers."""


@dataclass(frozen=True)
class PackedWeight:
    """How one weight is packed; `shape` and `dtype` are those of the weight itself."""

    format: str
    dtype: str
    shape: tuple[int, int]

    @property
    def layout(self) -> list[tuple[str, str, list[int]]]:
        """(part, dtype, shape) in order; raises `ValueError` for what no such weight has."""
        return _core.pack_layout(self.format, self.dtype, self.shape)

    @property
    def nbytes(self) -> int:
        """Of all parts together."""
        sizes = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}
        return sum(math.prod(shape) * sizes[dtype] for _, dtype, shape in self.layout)

    @property
    def dense_bytes(self) -> int:
        """Of the weight as it would be stored otherwise."""
        return math.prod(self.shape) * (4 if self.dtype == "F32" else 2)

    @property
    def bits(self) -> float:
        """Stored bits of a weight."""
        return self.nbytes * 8 / math.prod(self.shape)

    def pack(self, weight: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """The parts of a weight, as stored (bits of half types as uint16)."""
        return _core.pack(weight, self.dtype, self.format)

    def unpack(
        self, parts: Mapping[str, NDArray[Any]], start: int = 0, stop: int | None = None
    ) -> NDArray[Any]:
        """The weight as stored, or some rows; raises `ValueError` where the parts are no such."""
        return _core.unpack(
            dict(parts), self.dtype, self.format, self.shape, start=start, stop=stop
        )


def linear_of(weight: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `model.layers.0.mlp.up_proj`."""
    return weight.removesuffix(".weight")


def smallest(
    weight: NDArray[Any], dtype: str, pattern: _core.Pattern, given: str | None = None
) -> PackedWeight | None:
    """How a pruned weight is packed best; None where it is smaller as it is.

    Args:
        weight: as stored; fulfils `pattern`.
        given: the format that the method has packed it in by itself.
    """
    rows, columns = weight.shape
    packed = PackedWeight(
        given or _core.pack_format(weight, dtype, pattern), dtype, (rows, columns)
    )
    return packed if packed.nbytes < packed.dense_bytes else None


def planned_bytes(dtype: str, shape: tuple[int, int], pattern: str, sparsity: float) -> int:
    """The most that a weight of this pattern takes when it is packed."""
    rows, columns = shape
    stored = max(  # zeros are counted over rows, or over the matrix
        rows * (columns - math.floor(sparsity * columns + 0.5)),
        rows * columns - math.floor(sparsity * rows * columns + 0.5),
    )
    form = f"keep-of {pattern}" if ":" in pattern else f"bitmap {stored}"
    packed = PackedWeight(form, dtype, shape)
    return min(packed.nbytes, packed.dense_bytes)


def settings(packed: Mapping[str, PackedWeight]) -> dict[str, Any]:
    """`quantization_config` of a folder with these weights, by their names on disk."""
    return {
        "quant_method": METHOD,
        "version": _core.PACK_VERSION,
        "compute": COMPUTE_MODES[0],
        "linears": {linear_of(name): each.format for name, each in packed.items()},
        "dense": {linear_of(name): [each.dtype, list(each.shape)] for name, each in packed.items()},
    }


def with_settings(text: str, packed: Mapping[str, PackedWeight]) -> str:
    """A config.json for a folder with these packed weights, made from that of its source."""
    content = json.loads(text)
    known = content.pop("quantization_config", None)
    if not packed and known is None:
        return text
    if packed:
        content["quantization_config"] = settings(packed)
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_packed(folder: Path) -> dict[str, PackedWeight]:
    """What config.json says of packed weights, by their names on disk; empty if they are dense.

    Raises:
        UsageError: our section is malformed, or of a newer version.
    """
    try:
        content = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # who needs the file reads it with its own words for what is wrong
    found = content.get("quantization_config") if isinstance(content, dict) else None
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        return {}
    try:
        return packed_weights(found)
    except ValueError as error:
        raise UsageError(f"{folder / 'config.json'}: quantization_config: {error}") from None


def packed_weights(settings: Mapping[str, Any]) -> dict[str, PackedWeight]:
    """The packed weights of a `quantization_config`, by their names on disk.

    Raises:
        ValueError: naming the entry, what was expected and what was found.
    """
    version, compute = settings.get("version"), settings.get("compute")
    if version != _core.PACK_VERSION:
        raise ValueError(
            f"expected version {_core.PACK_VERSION}, found {version!r}; "
            "a newer rsprune may read this folder"
        )
    if compute not in COMPUTE_MODES:
        raise ValueError(f"compute: expected one of {', '.join(COMPUTE_MODES)}, found {compute!r}")
    linears, dense = settings.get("linears"), settings.get("dense")
    if not isinstance(linears, dict) or not isinstance(dense, dict):
        raise ValueError("expected objects 'linears' and 'dense'")
    if names := ", ".join(sorted(linears.keys() ^ dense.keys())[:4]):
        raise ValueError(f"expected the same names in 'linears' and 'dense', not so for {names}")
    if compute == "int8":
        for linear, form in linears.items():
            if str(form).partition(" ")[0] not in SIGNS:
                raise ValueError(f"{linear}: expected signs beside compute 'int8', found {form!r}")
    return {f"{linear}.weight": _weight(linear, linears[linear], dense[linear]) for linear in dense}


def _weight(linear: str, form: Any, dense: Any) -> PackedWeight:
    """One entry, weighed by its layout."""
    match form, dense:
        case str(), [str() as dtype, [int() as rows, int() as columns]] if rows > 0 and columns > 0:
            packed = PackedWeight(form, dtype, (rows, columns))
        case _:
            expected = "a format and [dtype, [rows, columns]]"
            raise ValueError(f"{linear}: expected {expected}, found {form!r} and {dense!r}")
    try:
        packed.nbytes  # noqa: B018 the layout refuses what does not fit
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{linear}: {error}") from None
    return packed


def check_parts(
    name: str, packed: PackedWeight, weight: NDArray[Any], parts: Mapping[str, NDArray[Any]]
) -> None:
    """Refuses parts that a method gives beside a weight and that are not that weight."""
    if not np.array_equal(packed.unpack(parts).view(np.uint8), weight.view(np.uint8)):
        raise RspruneError(
            f"{name}: the packed form of the method ({packed.format}) has other bits"
        )
