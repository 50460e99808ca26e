"""Tensors by their on-disk names, lent from the shards of a folder.

It is opened once: all headers are validated, no tensor byte is read. A packed linear is lent as the
dense weight that it holds, under that weight's name: nobody else needs to know of packing.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rsprune import _core
from rsprune.errors import RspruneError, UsageError
from rsprune.packing import PackedWeight, linear_of, read_packed

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PIECE_BYTES = 4 * 2**20
"""Bytes that are read together: little memory, and few calls."""

FLOATS = ("F32", "BF16", "F16")
"""Types in which a weight can be pruned."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk; of a packed weight what it would be if it were not packed."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Checkpoint:
    """A folder of safetensors shards, read tensor by tensor.

    Args:
        folder: where they lie.
        shards: open files by name.
        packed: how weights are packed, by their names on disk.
        index: the names that count; None for all that the shards hold.

    Raises:
        UsageError: parts of a packed weight are missing or are not what its format has.
    """

    def __init__(
        self,
        folder: Path,
        shards: dict[str, _core.Shard],
        packed: Mapping[str, PackedWeight] | None = None,
        index: Iterable[str] | None = None,
    ) -> None:
        self.folder = folder
        self._shards = shards
        self.tensors: dict[str, TensorInfo] = {}
        for file, shard in shards.items():
            for name, dtype, shape, nbytes in shard.tensors():
                self.tensors[name] = TensorInfo(name, file, dtype, tuple(shape), nbytes)
        if index is not None:
            self.tensors = {n: t for n, t in self.tensors.items() if n in index}
        self.packed = dict(packed or {})
        self._parts = {name: self._take_parts(name) for name in self.packed}

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Validates index and headers.

        Raises:
            UsageError: missing, truncated or malformed shard, entry that leaves the folder.
        """
        try:
            index = _core.checkpoint_index(folder)
            files = sorted(set(index.values()))
            shards = {file: _core.Shard(folder / file) for file in files}
        except (ValueError, KeyError, OSError) as error:
            raise UsageError(str(error)) from None
        return cls(folder, shards, read_packed(folder), index)

    def _take_parts(self, name: str) -> dict[str, TensorInfo]:
        """Puts a packed weight in place of its parts, which it returns."""
        packed, parts = self.packed[name], {}
        if name in self.tensors:
            raise UsageError(f"{name}: expected to be packed as config.json says, found it dense")
        for part, dtype, shape in packed.layout:
            part_name = f"{linear_of(name)}.{part}"
            if (info := self.tensors.pop(part_name, None)) is None:
                raise UsageError(
                    f"{part_name}: expected for {packed.format} in config.json, found none"
                )
            if (info.dtype, info.shape) != (dtype, tuple(shape)):
                found = f"found {info.dtype} {list(info.shape)}"
                raise UsageError(
                    f"{part_name}: expected {dtype} {shape} for {packed.format}, {found}"
                )
            parts[part] = info
        file = next(iter(parts.values())).file
        self.tensors[name] = TensorInfo(name, file, packed.dtype, packed.shape, packed.dense_bytes)
        return parts

    def stored_bytes(self, name: str) -> int:
        """What a tensor takes on disk, packed as it is."""
        return self.packed[name].nbytes if name in self.packed else self.tensors[name].nbytes

    @property
    def files(self) -> list[str]:
        """Names of the shards."""
        return list(self._shards)

    def pieces(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The elements of a tensor as stored, flat, a few MiB at a time, each with its start."""
        info = self.tensors[name]
        return self._pieces(info, 0, math.prod(info.shape))

    def _pieces(
        self, info: TensorInfo, first: int, count: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The same for `count` elements from `first` on, where starts are counted from; of a packed
        weight for whole rows.

        Read, not mapped: a file that is cut under the run is then an error and not a SIGBUS, and
        no page of the model counts as ours.

        Raises:
            RspruneError: the file cannot be read, or was written to since it was opened.
        """
        dtype = _torch_dtype(info)
        columns, size = math.prod(info.shape[1:]), dtype.itemsize
        if info.name in self.packed:
            rows, parts = max(1, PIECE_BYTES // (columns * size)), self._read_parts(info.name)
            stop = (first + count) // columns
            for start in range(first // columns, stop, rows):
                panel = self._unpack(info.name, parts, start, min(start + rows, stop))
                piece = torch.from_numpy(panel).view(dtype).reshape(-1)
                yield start * columns - first, piece
            return
        nbytes = count * size
        for start in range(0, nbytes, PIECE_BYTES):
            raw = self._read(info, first * size + start, min(PIECE_BYTES, nbytes - start))
            yield start // size, torch.from_numpy(raw).view(dtype)

    def copy_to(self, name: str, target: torch.Tensor) -> None:
        """Fills `target`, contiguous and of the tensor's shape, in the target's own type."""
        info = self.tensors[name]
        self._copy(info, 0, math.prod(info.shape), target)

    def _copy(self, info: TensorInfo, first: int, count: int, target: torch.Tensor) -> None:
        flat = target.reshape(-1)
        for start, piece in self._pieces(info, first, count):
            flat[start : start + len(piece)] = piece

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor in memory of its own, as stored or in another type."""
        info = self.tensors[name]
        found = torch.empty(info.shape, dtype=dtype or _torch_dtype(info))
        self.copy_to(name, found)
        return found

    def copy_rows(self, name: str, rows: range, target: torch.Tensor) -> None:
        """Fills `target`, contiguous, with rows that lie side by side, in the target's own type."""
        info = self.tensors[name]
        length = math.prod(info.shape[1:])
        self._copy(info, rows.start * length, len(rows) * length, target)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, flat, in the memory of its file; of a packed weight, unpacked.

        Whoever cuts the file while this is in use kills the process; what is read is safe of that.
        """
        if name in self.packed:
            return self.lend(name).reshape(-1).view(np.uint8)
        with named_errors():
            mapped = self._shards[self.tensors[name].file].map(name)
        return np.frombuffer(memoryview(mapped), dtype=np.uint8)

    def rows(self, name: str, indices: list[int]) -> torch.Tensor:
        """Some rows of a matrix, as stored, [indices, columns]."""
        info = self.tensors[name]
        dtype, columns = _torch_dtype(info), info.shape[1]
        if name in self.packed:
            return torch.from_numpy(self.lend(name)).view(dtype)[indices]
        length = columns * dtype.itemsize
        found = torch.empty(len(indices), columns, dtype=dtype)
        for place, row in enumerate(indices):
            found[place] = torch.from_numpy(self._read(info, row * length, length)).view(dtype)
        return found

    def lend(self, name: str) -> NDArray[Any]:
        """A weight as the solvers take it: float32, or the bits of a half type as uint16."""
        info = self.tensors[name]
        if name in self.packed:
            return self._unpack(name, self._read_parts(name))
        raw = self._read(info, 0, info.nbytes)
        bits: NDArray[Any] = raw.view(np.float32 if info.dtype == "F32" else np.uint16)
        return bits.reshape(info.shape)

    def copy_into(self, writer: _core.ShardWriter, name: str, called: str) -> None:
        """Copies a tensor into a file that is being written, a few MiB at a time; unpacks it.

        Args:
            name: what it is called here.
            called: what it is called there.
        """
        if name in self.packed:
            writer.put(called, self.lend(name).reshape(-1).view(np.uint8))
            return
        writer.copy(called, self._shards[self.tensors[name].file], renamed_from=name)

    def _read(self, info: TensorInfo, start: int, count: int) -> NDArray[np.uint8]:
        with named_errors():
            return self._shards[info.file].read_part(info.name, start, count)

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a packed weight, as stored."""
        infos, read = self._parts[name], self._read_parts(name)
        return {
            part: torch.from_numpy(raw)
            .view(TORCH_DTYPES[infos[part].dtype])
            .view(infos[part].shape)
            for part, raw in read.items()
        }

    def _read_parts(self, name: str) -> dict[str, NDArray[np.uint8]]:
        """The bytes of a packed weight's parts."""
        parts = self._parts[name].items()
        return {part: self._read(info, 0, info.nbytes) for part, info in parts}

    def _unpack(
        self,
        name: str,
        parts: Mapping[str, NDArray[np.uint8]],
        start: int = 0,
        stop: int | None = None,
    ) -> NDArray[Any]:
        try:
            return self.packed[name].unpack(parts, start, stop)
        except ValueError as error:
            raise RspruneError(f"{name} ({self.packed[name].format}): {error}") from None

    def check_finite(self, names: Iterable[str]) -> None:
        """Raises `UsageError` naming the first of the tensors that holds NaN or infinity."""
        for name in names:
            if self.tensors[name].dtype not in FLOATS:
                continue
            for start, piece in self.pieces(name):
                bad = ~torch.isfinite(piece)
                if bad.any():
                    at = int(bad.nonzero()[0])
                    found = f"found {float(piece[at])} at flat index {start + at}"
                    raise UsageError(f"{name}: expected finite weights, {found}")

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors agree bit for bit."""
        a, b = self.tensors[one], self.tensors[other]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        pairs = zip(self.pieces(one), self.pieces(other), strict=True)
        return all(
            torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for (_, x), (_, y) in pairs
        )


def _torch_dtype(info: TensorInfo) -> torch.dtype:
    """Raises `UsageError` where torch has no such type."""
    if info.dtype not in TORCH_DTYPES:
        known = ", ".join(TORCH_DTYPES)
        raise UsageError(f"{info.name}: expected dtype {known}, found {info.dtype}")
    return TORCH_DTYPES[info.dtype]


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """What the core says of a file (its name, offset and cause) ends the run."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise RspruneError(str(error)) from None


def as_stored(value: torch.Tensor, dtype: torch.dtype) -> NDArray[Any]:
    """A tensor as the writer takes it: bits of half types as uint16, as NumPy has no bfloat16."""
    stored = value.detach().to("cpu", dtype).contiguous()
    bits = stored.view(torch.uint16) if dtype.itemsize == 2 else stored
    array: NDArray[Any] = bits.numpy()
    return array


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hex digits.

    Raises:
        RspruneError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RspruneError(f"{path}: cannot be read: {error.strerror}") from None
