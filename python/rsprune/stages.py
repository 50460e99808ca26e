"""A recipe's stages, run one after another, each on the folder that the one before wrote.

    calibration: c4.jsonl                      # options of all stages
    stages:
      - {method: pip, remove: 20%}             # options of one of them
      - {method: sparsegpt, pattern: "2:4"}

Folders between two stages lie in `<out>.stages` until the last one has finished. A stage that has
finished is not repeated: its report says of which model and with which options it was made.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from rsprune import _core
from rsprune.checkpoint import Checkpoint
from rsprune.config import Config
from rsprune.errors import UsageError
from rsprune.output import check_output
from rsprune.progress import NullProgress, Progress
from rsprune.report import REPORT_NAME, Report, load_report
from rsprune.resume import difference, model_hashes, options_of
from rsprune.run import compress
from rsprune.sources import resolve


def compress_stages(
    model: str | Path,
    out: str | Path,
    configs: Sequence[Config],
    *,
    keep: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Runs the stages of a recipe.

    Args:
        model: folder, hub id or GGUF file.
        out: folder of the last stage's result. Its recipe lists all stages, and the reports of the
            others stand beside its own.
        configs: one a stage.
        keep: whether the folders between two stages stay.
        overwrite: whether `out` may exist.
        restart: whether all that is finished or unfinished is discarded.
        progress: what is told how far the run is.

    Returns:
        The report of the last stage.

    Raises:
        UsageError, RspruneError: as `compress`; or a finished stage was made with other options.
    """
    progress, out = progress or NullProgress(), Path(out)
    between = out.with_name(f"{out.name}.stages")
    if restart:
        shutil.rmtree(between, ignore_errors=True)
    if not between.exists():
        check_output(out, resolve(str(model)), overwrite=overwrite)
    between.mkdir(parents=True, exist_ok=True)
    source, folders = str(model), []
    for number, config in enumerate(configs, start=1):
        last = number == len(configs)
        folder = out if last else between / f"{number}-{config.method}"
        progress.note(f"stage {number} of {len(configs)}: {config.method}")
        if _is_finished(folder, source, config, may_differ=last):
            progress.note(f"stage {number}: finished before")
        else:
            compress(
                source, folder, config, overwrite=last and overwrite, restart=restart,
                progress=progress, base_model=str(model),
            )  # fmt: skip
        source = str(folder)
        folders.append(folder)
    _describe(folders, configs)
    if not keep:
        shutil.rmtree(between)
    return load_report(out)


def _is_finished(folder: Path, source: str, config: Config, *, may_differ: bool) -> bool:
    """Whether a stage's folder was made of this model with these options.

    Raises:
        UsageError: it was not, unless it may differ (`compress` then says what becomes of it).
    """
    if not (folder / REPORT_NAME).exists():
        return False
    recorded = load_report(folder).run.get("fingerprint") or {}
    current = {
        "options": options_of(config),
        "model files": model_hashes(Checkpoint.open(resolve(source))),
    }
    found = difference(recorded, current)
    if found is None or may_differ:
        return found is None
    part, then, now = found
    raise UsageError(
        f"{folder}: a finished stage lies here whose {part} differs: expected {then!r}, found "
        f"{now!r}; repeat that run, or pass --restart"
    )


def _describe(folders: Sequence[Path], configs: Sequence[Config]) -> None:
    """Puts all stages in the last one's recipe, and the others' reports beside its own."""
    *others, out = folders
    for number, folder in enumerate(others, start=1):
        name = REPORT_NAME.replace(".jsonl", f"-stage-{number}.jsonl")
        _core.write_file(out / name, (folder / REPORT_NAME).read_bytes())
    stages = {"stages": [config.model_dump(mode="json") for config in configs]}
    _core.write_file(out / "recipe.yaml", yaml.safe_dump(stages, sort_keys=False).encode())
