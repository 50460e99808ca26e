"""What `compress` drives: the steps that every kind of run has, in their order."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rsprune.config import Config
from rsprune.memory import PeakWatch
from rsprune.output import OutputFolder
from rsprune.progress import Progress


class Driver(Protocol):
    """One run; its methods stand in the order in which they are called."""

    def __init__(
        self, folder: Path, config: Config, out: Path, progress: Progress, peak: PeakWatch
    ) -> None:
        """Plans; all refusals that need no text."""

    def read_inputs(self) -> None:
        """Reads what decides whether the run can be done."""

    def take_up(self, output: OutputFolder, *, restart: bool) -> None:
        """Opens the journal: a new one, or that of the unfinished run that lies there."""

    def leave(self, output: OutputFolder) -> None:
        """Closes a run that cannot go on; what is finished stays, for the next one."""

    def write_layers(self, output: OutputFolder) -> None:
        """Does the work, and writes a shard for every decoder layer."""

    def finish(self, output: OutputFolder, model: str) -> None:
        """Writes all else and names the folder."""
