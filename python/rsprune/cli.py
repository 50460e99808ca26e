"""The commands. What is heavy is imported where it is used: `--help` must not wait for torch.

Exit codes: 0 fine; 1 `verify` found problems, or an internal error; 2 refused (an option, a file,
a model); 3 `plan` or `eval` found that it does not fit in memory; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import contextlib
import io
import json as json_module
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rsprune.options import Device, Threads, config_of, configs_of, takes_options
from rsprune.train_command import train

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rsprune.config import Config
    from rsprune.progress import Progress

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help costs 60 ms more than all the rest of `--help`
    help="Prune large language models on the CPU that you have, one decoder layer at a time.",
)

Option, Argument = typer.Option, typer.Argument
Model = Annotated[str, Argument(help="Folder, hub id or GGUF file.")]
Folder = Annotated[Path, Argument(help="Folder that `compress` wrote.")]
Json = Annotated[bool, Option("--json", help="JSON on stdout: one object a line.")]
Quiet = Annotated[bool, Option("--quiet", help="Print nothing but errors.")]
All = Annotated[bool, Option("--all", help="One row per tensor instead of one per kind.")]


@contextlib.contextmanager
def _progress(json: bool, quiet: bool) -> Iterator[Progress]:
    """The display of a run, closed before anything else is printed."""
    from rsprune.progress import make_progress

    progress = make_progress(json=json, quiet=quiet)
    try:
        yield progress
    finally:
        progress.close()


@contextlib.contextmanager
def _exit_if_it_does_not_fit() -> Iterator[None]:
    """Exit code 3 where memory does not suffice."""
    from rsprune.errors import DoesNotFitError

    try:
        yield
    except DoesNotFitError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(3) from None


def _show(renderable: RenderableType) -> None:
    from rich.console import Console

    Console().print(renderable)


def _emit(**fields: Any) -> None:
    """The result of a command as one line of JSON."""
    print(json_module.dumps({"event": "result", **fields}, sort_keys=True, default=str))


@app.command()
def demo(
    *,
    folder: Annotated[Path, Option(help="Where the demo writes.")] = Path("rsprune-demo"),
    method: Annotated[str, Option(help="Method to show.")] = "sparsegpt",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune SmolLM2-135M and measure what it cost."""
    from rsprune.demo import demo as run_demo
    from rsprune.demo import demo_table

    with _progress(json, quiet) as progress:
        result = run_demo(folder, method=method, progress=progress)
    if json:
        dense, pruned = result.dense.perplexity, result.pruned.perplexity
        _emit(folder=result.report.folder, dense_perplexity=dense, pruned_perplexity=pruned)
    elif not quiet:
        _show(demo_table(result))


@app.command()
@takes_options
def plan(model: Model, *, json: Json = False, **options: Any) -> None:
    """Say what `compress` would do and need; exit code 3 where it does not fit in memory."""
    with _exit_if_it_does_not_fit():
        _plan(model, None, config_of(options), json)


@app.command()
@takes_options
def compress(
    model: Model,
    out: Annotated[Path, Argument(help="Folder of the result.")],
    *,
    overwrite: Annotated[
        bool, Option("--overwrite", help="OUT may exist and is replaced.")
    ] = False,
    restart: Annotated[
        bool, Option("--restart", help="Discard an unfinished run of OUT; the default goes on.")
    ] = False,
    keep_stages: Annotated[
        bool, Option("--keep-stages", help="Keep the folders between a recipe's stages.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only plan.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Prune a checkpoint, layer by layer, or remove layers from it."""
    if dry_run:
        _plan(model, out, config_of(options), json)
        return
    configs = configs_of(options)
    if keep_stages and len(configs) == 1:
        raise typer.BadParameter("--keep-stages goes with a recipe that lists stages")
    how: dict[str, Any] = {"overwrite": overwrite, "restart": restart}
    with _progress(json, quiet) as progress:
        if len(configs) == 1:
            from rsprune.run import compress as run_compress

            report = run_compress(model, out, configs[0], progress=progress, **how)
        else:
            from rsprune.stages import compress_stages

            report = compress_stages(
                model, out, configs, keep=keep_stages, progress=progress, **how
            )
    if json:
        _emit(folder=report.folder, summary=report.summary)
    elif not quiet:
        from rsprune.tables import certificate_table, removal_table, summary_table

        _show(removal_table(report) if report.removals else certificate_table(report))
        _show(summary_table(report))


def _plan(model: str, out: Path | None, config: Config, json: bool) -> None:
    from rsprune.driver import estimated_plan
    from rsprune.estimate import total

    made, stages = estimated_plan(model, config, out)
    if json:
        _emit(plan=asdict(made), stages=[asdict(stage) for stage in stages])
        return
    from rsprune.tables import plan_table, stage_table

    _show(plan_table(made))
    _show(stage_table([*stages, total(stages)]))


@app.command()
def blocks(
    model: Model,
    *,
    calibration: Annotated[
        list[str] | None, Option(help="Text, JSON-lines, parquet file; hub:NAME; repeatable.")
    ] = None,
    calibration_field: Annotated[
        str | None, Option(help="Field of the records with the text.")
    ] = None,
    texts: Annotated[int | None, Option(help="Texts that score the layers [20].")] = None,
    text_tokens: Annotated[int | None, Option(help="Tokens of such a text [256].")] = None,
    edit_rate: Annotated[float | None, Option(help="Share of words edited [0.15].")] = None,
    seed: Annotated[int | None, Option(help="Seed of texts and edits [0].")] = None,
    html: Annotated[Path | None, Option(help="Draw the scores in this file.")] = None,
    memory: Annotated[str | None, Option(help="Bound on memory, such as 4GiB.")] = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score every decoder layer by every metric; nothing is removed."""
    config = config_of(
        {"recipe": None, "calibration": calibration, "calibration_field": calibration_field,
         "texts": texts, "text_tokens": text_tokens, "edit_rate": edit_rate, "seed": seed,
         "memory": memory, "device": device, "threads": threads}
    )  # fmt: skip
    from rsprune.depth.picture import survey_page
    from rsprune.depth.survey import survey

    with _exit_if_it_does_not_fit(), _progress(json, quiet) as progress:
        found = survey(model, config, progress=progress)
    if html is not None:
        page = survey_page(found.model.name, found.layers, found.scores)
        html.write_text(page, encoding="utf-8")
    if json:
        _emit(**asdict(found))
    elif not quiet:
        from rsprune.tables import score_table

        _show(score_table(found.scores))


@app.command(name="eval")
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
    kind = _one_of(text=text, tasks=tasks)
    for other in own.keys() - {kind}:
        for name, value in own[other].items():
            if value is not None:
                raise typer.BadParameter(f"--{name.replace('_', '-')} goes with --{other}")
    options = {"seq_len": seq_len, **shared, **own[kind]}
    given = {name: value for name, value in options.items() if value is not None}
    with _exit_if_it_does_not_fit(), _progress(json, quiet) as progress:
        if text is not None:
            _evaluate_text(model, text, json, progress, given)
        else:
            _evaluate_tasks(model, tasks or [], json, quiet, progress, given)


def _one_of(**options: Any) -> str:
    """The name of the one option that is given."""
    given = [name for name, value in options.items() if value]
    if len(given) != 1:
        expected = " or ".join(f"--{name}" for name in options)
        raise typer.BadParameter(f"expected {expected}, found {' and '.join(given) or 'neither'}")
    return given[0]


def _evaluate_text(
    model: str, text: Path, json: bool, progress: Progress, options: dict[str, Any]
) -> None:
    from rsprune.evaluate import perplexity

    found = perplexity(model, text, progress=progress, **options)
    progress.close()
    if json:
        _emit(**asdict(found))
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
        _emit(**fields)
    else:
        print(found.table)


@app.command(name="inspect")
def inspect_folder(out: Folder, *, json: Json = False, every: All = False) -> None:
    """Show what a checkpoint really holds."""
    from rsprune.inspect import inspect as facts_of
    from rsprune.inspect import totals

    facts = facts_of(out)
    total = totals(out, facts)
    if json:
        _emit(tensors=[asdict(fact) for fact in facts], totals=asdict(total))
        return
    from rsprune.tables import inspect_table

    _show(inspect_table(facts, total, every=every))


@app.command()
def export(
    folder: Annotated[Path, Argument(help="Folder of a checkpoint.")],
    target: Annotated[Path, Argument(help="Folder to write, or NAME.gguf.")],
    *,
    dense: Annotated[bool, Option("--dense", help="An ordinary folder, zeros stored.")] = False,
    type_: Annotated[
        str | None,
        Option(
            "--type",
            help="GGUF [extra gguf]: F16, BF16, F32; lossless or refused: TQ1_0, TQ2_0, Q1_0.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="TARGET may exist and is replaced.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write what loads without rsprune: an ordinary folder, or a GGUF file for llama.cpp."""
    _one_of(dense=dense, type=type_)
    fields: dict[str, Any] = {"target": target}
    shown: RenderableType = f"{target}: written"
    with _progress(json, quiet) as progress:
        if type_ is None:
            from rsprune.export import export_dense

            export_dense(folder, target, overwrite=overwrite, progress=progress)
        else:
            fields, shown = _export_gguf(folder, target, type_, overwrite, progress)
    if json:
        _emit(**fields)
    elif not quiet:
        _show(shown)


def _export_gguf(
    folder: Path, target: Path, kind: str, overwrite: bool, progress: Progress
) -> tuple[dict[str, Any], RenderableType]:
    from rsprune.gguf_export import export_gguf
    from rsprune.tables import export_table

    found = export_gguf(folder, target, kind, overwrite=overwrite, progress=progress)
    for note in found.notes:
        progress.note(f"note: {note}")
    return {**asdict(found), "bits_per_weight": found.bits_per_weight}, export_table(found)


@app.command()
def verify(out: Folder, *, json: Json = False) -> None:
    """Check a folder against its report."""
    from rsprune.verify import verify as problems_of

    problems = problems_of(out)
    if json:
        _emit(ok=not problems, problems=[asdict(problem) for problem in problems])
    else:
        for problem in problems:
            print(f"problem: {problem}")
        print(f"{out}: {len(problems)} problems" if problems else f"{out}: all is well")
    if problems:
        raise typer.Exit(1)


app.command()(train)


def main() -> NoReturn:
    """Runs the command line and ends the process with its exit code."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.Abort:
        code = 130
    except BrokenPipeError:
        # The reader of our output has gone: nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        code = _report_error(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code if isinstance(code, int) else 0)


def _terminated(*_: object) -> NoReturn:
    """SIGTERM leaves as Ctrl-C does: whatever runs closes its files on the way out."""
    raise SystemExit(143)


def _report_error(error: BaseException) -> int:
    """One line on stderr; the exit code."""
    from rsprune.errors import one_line

    usage = getattr(error, "format_message", None)  # typer's own: an option or argument is wrong
    refused = isinstance(error, (ValueError, FileNotFoundError, NotADirectoryError))
    refused = refused or isinstance(error, (IsADirectoryError, PermissionError))
    if os.environ.get("RSPRUNE_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    if usage is not None:
        text = usage()
    elif refused or isinstance(error, OSError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (RSPRUNE_DEBUG=1 shows where)"
    print(f"error: {one_line(text)}", file=sys.stderr)
    return 2 if refused or usage is not None else 1
