"""What the commands share: how they are told what to print, and how they print it."""

from __future__ import annotations

import contextlib
import json as json_module
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rsprune.progress import Progress

__all__ = ["Json", "Model", "Quiet", "emit", "exit_if_it_does_not_fit", "one_of", "show", "showing"]

Model = Annotated[str, Argument(help="Folder, hub id or GGUF file.")]
Json = Annotated[bool, Option("--json", help="JSON on stdout: one object a line.")]
Quiet = Annotated[bool, Option("--quiet", help="Print nothing but errors.")]


@contextlib.contextmanager
def showing(json: bool, quiet: bool) -> Iterator[Progress]:
    """The display of a run, closed before anything else is printed."""
    from rsprune.progress import make_progress

    progress = make_progress(json=json, quiet=quiet)
    try:
        yield progress
    finally:
        progress.close()


@contextlib.contextmanager
def exit_if_it_does_not_fit() -> Iterator[None]:
    """Exit code 3 where memory does not suffice."""
    from rsprune.errors import DoesNotFitError

    try:
        yield
    except DoesNotFitError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(3) from None


def show(renderable: RenderableType) -> None:
    """A table, or a sentence."""
    from rich.console import Console

    Console().print(renderable)


def emit(**fields: Any) -> None:
    """The result of a command as one line of JSON."""
    print(json_module.dumps({"event": "result", **fields}, sort_keys=True, default=str))


def one_of(**options: Any) -> str:
    """The name of the one option that is given; raises `typer.BadParameter`."""
    given = [name for name, value in options.items() if value]
    if len(given) != 1:
        expected = " or ".join(f"--{name}" for name in options)
        raise typer.BadParameter(f"expected {expected}, found {' and '.join(given) or 'neither'}")
    return given[0]
