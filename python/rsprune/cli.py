"""The commands. What is heavy is imported where it is used: `--help` must not wait for torch.

Exit codes: 0 fine; 1 `verify` found problems, or an internal error; 2 refused (an option, a file,
a model); 3 `plan` or `eval` found that it does not fit in memory; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rsprune.console import (
    Json,
    Model,
    Quiet,
    emit,
    exit_if_it_does_not_fit,
    one_of,
    show,
    showing,
)
from rsprune.eval_command import evaluate
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
Folder = Annotated[Path, Argument(help="Folder that `compress` wrote.")]
All = Annotated[bool, Option("--all", help="One row per tensor instead of one per kind.")]


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

    with showing(json, quiet) as progress:
        result = run_demo(folder, method=method, progress=progress)
    if json:
        dense, pruned = result.dense.perplexity, result.pruned.perplexity
        emit(folder=result.report.folder, dense_perplexity=dense, pruned_perplexity=pruned)
    elif not quiet:
        show(demo_table(result))


@app.command()
@takes_options
def plan(model: Model, *, json: Json = False, **options: Any) -> None:
    """Say what `compress` would do and need; exit code 3 where it does not fit in memory."""
    with exit_if_it_does_not_fit():
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
        with exit_if_it_does_not_fit():
            _plan(model, out, config_of(options), json)
        return
    configs = configs_of(options)
    if keep_stages and len(configs) == 1:
        raise typer.BadParameter("--keep-stages goes with a recipe that lists stages")
    how: dict[str, Any] = {"overwrite": overwrite, "restart": restart}
    with showing(json, quiet) as progress:
        if len(configs) == 1:
            from rsprune.run import compress as run_compress

            report = run_compress(model, out, configs[0], progress=progress, **how)
        else:
            from rsprune.stages import compress_stages

            report = compress_stages(
                model, out, configs, keep=keep_stages, progress=progress, **how
            )
    if json:
        emit(folder=report.folder, summary=report.summary)
    elif not quiet:
        from rsprune.tables import certificate_table, removal_table, summary_table

        show(removal_table(report) if report.removals else certificate_table(report))
        show(summary_table(report))


def _plan(model: str, out: Path | None, config: Config, json: bool) -> None:
    from rsprune.driver import estimated_plan
    from rsprune.estimate import total

    made, stages = estimated_plan(model, config, out)
    if json:
        emit(plan=asdict(made), stages=[asdict(stage) for stage in stages])
        return
    from rsprune.tables import plan_table, stage_table

    show(plan_table(made))
    show(stage_table([*stages, total(stages)]))


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

    if html is not None and not html.parent.is_dir():
        raise typer.BadParameter(f"--html: expected a file in a folder that exists, found {html}")
    with exit_if_it_does_not_fit(), showing(json, quiet) as progress:
        found = survey(model, config, progress=progress)
    if json:
        emit(**asdict(found))
    elif not quiet:
        from rsprune.tables import score_table

        show(score_table(found.scores))
    if html is not None:
        page = survey_page(found.model.name, found.layers, found.scores)
        html.write_text(page, encoding="utf-8")


@app.command(name="inspect")
def inspect_folder(out: Folder, *, json: Json = False, every: All = False) -> None:
    """Show what a checkpoint really holds."""
    from rsprune.inspect import inspect as facts_of
    from rsprune.inspect import totals

    facts = facts_of(out)
    total = totals(out, facts)
    if json:
        emit(tensors=[asdict(fact) for fact in facts], totals=asdict(total))
        return
    from rsprune.tables import inspect_table

    show(inspect_table(facts, total, every=every))


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
    one_of(dense=dense, type=type_)
    fields: dict[str, Any] = {"target": target}
    shown: RenderableType = f"{target}: written"
    with showing(json, quiet) as progress:
        if type_ is None:
            from rsprune.export import export_dense

            export_dense(folder, target, overwrite=overwrite, progress=progress)
        else:
            fields, shown = _export_gguf(folder, target, type_, overwrite, progress)
    if json:
        emit(**fields)
    elif not quiet:
        show(shown)


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
        emit(ok=not problems, problems=[asdict(problem) for problem in problems])
    else:
        for problem in problems:
            print(f"problem: {problem}")
        print(f"{out}: {len(problems)} problems" if problems else f"{out}: all is well")
    if problems:
        raise typer.Exit(1)


app.command(name="eval")(evaluate)
app.command()(train)


def entry() -> NoReturn:
    """`main` as a process: one that was told to end does so when its files are closed.

    Python would take the modules of torch apart first, for a second and more.
    """
    try:
        main()
    except SystemExit as end:
        if end.code not in (130, 143):
            raise
        code = end.code
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


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
