"""The header of a GGUF file, walked once in bounded time before the gguf package reads it.

    magic, version, tensors, pairs | pairs x (key, type, value) | tensors x (name, sizes, type, at)

The package trusts every count: past the end of the file its reads are empty, not errors, so a
promise of 2**60 elements is a loop without end that takes memory in every turn. Here each count is
held against the bytes that are left and against what real files have.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from rsprune.errors import UsageError

__all__ = ["check_header"]

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""GGUF value type -> bytes of a value."""
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_ELEMENTS = 1 << 22
"""Of all arrays together: vocabularies and merges. Each becomes some objects in memory."""
MAX_SIZES = 4
"""Dimensions of a tensor."""


def check_header(path: Path) -> None:
    """Walks the header of the GGUF file `path`.

    Raises:
        UsageError: naming the file, the byte and what is wrong there.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise UsageError(f"{path}: not a whole GGUF file: {path.stat().st_size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                _Walk(data).header()
            except (_BrokenError, struct.error, UnicodeDecodeError) as error:
                raise UsageError(f"{path}: not a whole GGUF file: {error}") from None


class _BrokenError(Exception):
    """What is wrong, without the file's name."""


class _Walk:
    """A position in the header and how many array elements may still come."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0
        self.elements = MAX_ELEMENTS

    def header(self) -> None:
        magic = self.data[:4]
        if magic != MAGIC:
            raise _BrokenError(f"expected {MAGIC!r} at its start, found {magic!r}")
        self.at = 4
        version = self.number("I")
        if version not in VERSIONS:
            raise _BrokenError(f"expected version {VERSIONS}, little-endian, found {version}")
        tensors, pairs = self.number("Q"), self.number("Q")
        self.bounded("tensors", tensors, MAX_TENSORS)
        self.bounded("keys", pairs, MAX_PAIRS)
        for _ in range(pairs):
            self.text("key")
            self.value(self.number("I"))
        for _ in range(tensors):
            self.tensor()

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.text("string")
        elif kind == ARRAY:
            self.array()
        elif kind in SCALAR_BYTES:
            self.skip(SCALAR_BYTES[kind], "value")
        else:
            raise _BrokenError(f"unknown value type {kind} at byte {self.at}")

    def array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        self.bounded("array elements", count, self.elements)
        self.elements -= count
        if kind == STRING:
            for _ in range(count):
                self.text("string")
        elif kind in SCALAR_BYTES:
            self.skip(count * SCALAR_BYTES[kind], "array")
        else:
            raise _BrokenError(f"unknown type {kind} of array elements at byte {self.at}")

    def tensor(self) -> None:
        self.text("tensor name")
        sizes = self.number("I")
        self.bounded("dimensions of a tensor", sizes, MAX_SIZES)
        values = 1
        for _ in range(sizes):
            values *= self.number("Q")
        self.skip(12, "type and offset of a tensor")
        self.bounded("values of a tensor", values, 8 * len(self.data))  # a bit each at the least

    def number(self, form: str) -> int:
        """The next unsigned number: `I` for 4 bytes, `Q` for 8."""
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(form)
        return int(value)

    def text(self, what: str) -> None:
        length = self.number("Q")
        start = self.at
        self.skip(length, what)
        self.data[start : self.at].decode("utf-8")

    def skip(self, length: int, what: str) -> None:
        if length > len(self.data) - self.at:
            raise _BrokenError(
                f"{what} of {length} bytes at byte {self.at}, the file ends at {len(self.data)}"
            )
        self.at += length

    def bounded(self, what: str, found: int, most: int) -> None:
        if found > most:
            raise _BrokenError(f"{what}: expected at most {most}, found {found} at byte {self.at}")
