"""Hidden states of all calibration windows, between two decoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rsprune.scratch import reserve


@dataclass(frozen=True)
class Split:
    """Windows come in this order: first those that solvers see, then the held-out ones."""

    calibration: int
    heldout: int

    @property
    def count(self) -> int:
        """All windows."""
        return self.calibration + self.heldout


FEW = Split(6, 2)
"""Windows that are looked at before a run; the second part judges."""


class Windows:
    """[count, tokens, channels] float32, in memory or in a file.

    In a file they count as file-backed memory that the system may drop, not as anonymous memory.
    """

    def __init__(self, count: int, tokens: int, channels: int, spill: Path | None = None) -> None:
        size = count * tokens * channels
        if spill is None:
            flat = torch.empty(size)
        else:
            with spill.open("wb") as file:
                reserve(file, size * 4, f"{spill}: hidden states")
            flat = torch.from_file(str(spill), shared=True, size=size)
        self.tokens = tokens
        self.channels = channels
        self._data = flat.reshape(count, tokens, channels)

    def __len__(self) -> int:
        return len(self._data)

    def get(self, window: int, device: torch.device) -> Tensor:
        """[1, tokens, channels] of one window."""
        return self._data[window : window + 1].to(device)

    def put(self, window: int, value: Tensor) -> None:
        """Stores [1, tokens, channels] (or [tokens, channels]) of one window."""
        self._data[window] = value.reshape(self._data.shape[1:])

    def copy_from(self, other: Windows) -> None:
        """Takes over the contents of `other`, which has the same shape."""
        self._data.copy_(other._data)
