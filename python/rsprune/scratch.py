"""Arrays in an unnamed file: memory that the system may write out, and that counts as file-backed.

The pruned experts of a layer lie there until their shard is written, so that one expert at a time
is in anonymous memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Scratch:
    """Room for arrays, one after another; the disk has it back when nobody holds any of them.

    Args:
        folder: on whose disk the file lies.
        nbytes: room for all arrays; what is not written takes no space.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            self._room = np.memmap(file, np.uint8, "w+", shape=(nbytes,))
        self._used = 0

    def keep(self, array: NDArray[Any]) -> NDArray[Any]:
        """A copy of `array` in the file."""
        place = self._room[self._used : self._used + array.nbytes]
        self._used += array.nbytes
        kept: NDArray[Any] = np.asarray(place).view(array.dtype).reshape(array.shape)
        kept[...] = array
        return kept
