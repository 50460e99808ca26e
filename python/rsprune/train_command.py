"""The command `rsprune train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from rsprune.console import Json, Quiet, showing
from rsprune.options import Threads

__all__ = ["train"]


def train(
    folder: Annotated[Path, Argument(help="Folder that `compress --method flexigpt` wrote.")],
    out: Annotated[Path, Argument(help="Folder of the result.")],
    *,
    text: Annotated[Path, Option(help="Text to train on.")],
    steps: Annotated[int | None, Option(help="Steps of Adam [200].")] = None,
    seq_len: Annotated[int | None, Option(help="Tokens of a window [512].")] = None,
    batch: Annotated[int | None, Option(help="Windows a step [1].")] = None,
    rate: Annotated[float | None, Option(help="Largest step size [3e-4].")] = None,
    seed: Annotated[int | None, Option(help="Seed of the order of windows [0].")] = None,
    threads: Threads = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="OUT may exist and is replaced.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train adapters, gains and maps of replaced layers; the same command goes on after a kill."""
    from rsprune.flexi.train import Training
    from rsprune.flexi.train import train as run

    given: dict[str, Any] = {
        "steps": steps, "seq_len": seq_len, "batch": batch, "rate": rate, "seed": seed,
        "threads": threads,
    }  # fmt: skip
    options = Training(**{name: value for name, value in given.items() if value is not None})
    with showing(json, quiet) as progress:
        found = run(folder, out, text, options, overwrite=overwrite, progress=progress)
        progress.note(f"loss {found['loss_first']:.4f} -> {found['loss_last']:.4f}")
