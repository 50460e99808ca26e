"""The command `rsprune eval`."""

from __future__ import annotations

import contextlib
import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from rsprune.console import Json, Model, Quiet, emit, exit_if_it_does_not_fit, one_of, showing
from rsprune.options import Device, Threads

if TYPE_CHECKING:
    from rsprune.progress import Progress

__all__ = ["evaluate"]


def evaluate(
    model: Model,
    *,
    text: Annotated[Path | None, Option(help="Perplexity of this text file, in order.")] = None,
    tasks: Annotated[
        list[str] | None,
        Option(help="lm-evaluation-harness: task, group or YAML file; repeatable [extra eval]."),
    ] = None,
    seq_len: Annotated[
        int | None, Option(help="Tokens of a window [2048]; with --tasks, at most [the model's].")
    ] = None,
    windows: Annotated[int | None, Option(help="Text: only the first windows [all].")] = None,
    include_path: Annotated[Path | None, Option(help="Tasks: folder of task files.")] = None,
    num_fewshot: Annotated[int | None, Option(help="Tasks: examples [the task's].")] = None,
    limit: Annotated[int | None, Option(help="Tasks: only so many questions [all].")] = None,
    memory: Annotated[str | None, Option(help="Bound on memory, such as 4GiB.")] = None,
    resume: Annotated[
        Path | None, Option(help="File that keeps what is finished; gone on with if it is there.")
    ] = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity or tasks, layer by layer; exit code 3 where memory does not suffice."""
    shared = {"memory": memory, "resume": resume, "device": device, "threads": threads}
    own: dict[str, dict[str, Any]] = {
        "text": {"windows": windows},
        "tasks": {"include_path": include_path, "num_fewshot": num_fewshot, "limit": limit},
    }
    kind = one_of(text=text, tasks=tasks)
    for other in own.keys() - {kind}:
        for name, value in own[other].items():
            if value is not None:
                raise typer.BadParameter(f"--{name.replace('_', '-')} goes with --{other}")
    options = {"seq_len": seq_len, **shared, **own[kind]}
    given = {name: value for name, value in options.items() if value is not None}
    with exit_if_it_does_not_fit(), showing(json, quiet) as progress:
        if text is not None:
            _evaluate_text(model, text, json, progress, given)
        else:
            _evaluate_tasks(model, tasks or [], json, quiet, progress, given)


def _evaluate_text(
    model: str, text: Path, json: bool, progress: Progress, options: dict[str, Any]
) -> None:
    from rsprune.evaluate import perplexity

    found = perplexity(model, text, progress=progress, **options)
    progress.close()
    if json:
        emit(**asdict(found))
        return
    error = "" if found.standard_error is None else f" +- {found.standard_error:.4f}"
    print(
        f"perplexity {found.perplexity:.4f}{error}  ({found.windows} windows of {found.seq_len} "
        f"tokens, mean loss {found.loss:.5f}, {found.seconds:.1f} s)"
    )


def _evaluate_tasks(
    model: str,
    tasks: list[str],
    json: bool,
    quiet: bool,
    progress: Progress,
    options: dict[str, Any],
) -> None:
    from rsprune.eval_tasks import evaluate_tasks

    # The harness and its data sets draw bars of their own on stderr.
    hidden = contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext()
    with hidden:
        found = evaluate_tasks(model, tasks, progress=progress, **options)
    progress.close()
    if json:
        fields = asdict(found)
        del fields["samples"], fields["table"]  # for Python: every question, and for people
        emit(**fields)
    else:
        print(found.table)
