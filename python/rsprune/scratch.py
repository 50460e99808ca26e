"""Arrays in an unnamed file: memory that the system may write out, and that counts as file-backed.

The pruned experts of a layer lie there until their shard is written, so that one expert at a time
is in anonymous memory.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsprune.errors import RspruneError


class Scratch:
    """Room for arrays, one after another; the disk has it back when nobody holds any of them.

    Args:
        folder: on whose disk the file lies.
        nbytes: room for all arrays.

    Raises:
        RspruneError: the disk has less room.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            reserve(file, nbytes, f"{folder}: pruned experts")
            self._room = np.memmap(file, np.uint8, "w+", shape=(nbytes,))
        self._used = 0

    def keep(self, array: NDArray[Any]) -> NDArray[Any]:
        """A copy of `array` in the file."""
        place = self._room[self._used : self._used + array.nbytes]
        self._used += array.nbytes
        kept: NDArray[Any] = np.asarray(place).view(array.dtype).reshape(array.shape)
        kept[...] = array
        return kept

    def keep_tensor(self, tensor: Tensor) -> Tensor:
        """The same for a tensor on the CPU, contiguous, of any type."""
        raw = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        return torch.from_numpy(self.keep(raw)).view(tensor.dtype).reshape(tensor.shape)


def reserve(file: IO[bytes], size: int, what: str) -> None:
    """Takes the disk blocks now: a mapped file that finds none later is killed by SIGBUS."""
    try:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        raise RspruneError(f"{what} need {size} bytes on disk: {error.strerror}") from None
