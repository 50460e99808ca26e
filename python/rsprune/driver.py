"""What `compress` drives: the steps that every kind of run has, in their order; and their plans."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rsprune import methods
from rsprune.config import Config
from rsprune.depth import plan as depth
from rsprune.estimate import Stage, estimate
from rsprune.flexi import plan as flexi
from rsprune.memory import PeakWatch
from rsprune.output import OutputFolder
from rsprune.plan import Plan, prepare
from rsprune.progress import Progress
from rsprune.sources import resolve


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


def make_plan(model: str | Path, config: Config, out: Path | None = None) -> Plan:
    """Says what `compress` would do, and refuses what it would refuse.

    Args:
        model: folder, hub id or GGUF file.
        config: the options.
        out: where the output would lie, to look at its disk.

    Raises:
        UsageError: naming the tensor or option, what was expected and what was found.
    """
    folder = resolve(str(model))
    if methods.removes_layers(config.method):
        return _depth_plan(folder, config, out).plan
    return prepare(folder, config, out).plan


def estimated_plan(
    model: str | Path, config: Config, out: Path | None = None
) -> tuple[Plan, list[Stage]]:
    """`make_plan`, and how long every stage will take on this machine as it is now."""
    folder = resolve(str(model))
    if methods.removes_layers(config.method):
        return depth.estimate(_depth_plan(folder, config, out), config)
    return estimate(prepare(folder, config, out), config)


def _depth_plan(folder: Path, config: Config, out: Path | None) -> depth.Prepared:
    planner = flexi.prepare if config.method == "flexigpt" else depth.prepare
    return planner(folder, config, out)
