"""`rsprune demo`: a real small model, pruned and measured in a few minutes, without a hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rsprune.config import Config
from rsprune.progress import NullProgress, Progress
from rsprune.report import Report

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rsprune.evaluate import Perplexity

__all__ = ["DemoResult", "demo", "demo_table"]

SEPARATOR = "\n\n"
CAVEAT = (
    "The text is the Python manual's topics, three quarters for calibration and the last quarter "
    "for perplexity: good enough to see that it works, no basis for claims of quality."
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured."""

    model: Path
    """The dense model's folder."""
    report: Report
    """Of the run; its `folder` is the pruned model."""
    dense: Perplexity
    pruned: Perplexity
    dense_bytes: int
    pruned_bytes: int


def demo(
    folder: Path,
    *,
    method: str = "sparsegpt",
    pattern: str = "2:4",
    samples: int = 32,
    seq_len: int = 512,
    windows: int = 24,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Prunes SmolLM2-135M and measures its perplexity before and after.

    Args:
        folder: gets the two texts and the pruned model; what an earlier demo put there is replaced.
        method, pattern, samples, seq_len: as in `Config`.
        windows: of `seq_len` tokens, for the perplexities.
        cache: where the downloaded model is kept.
        progress: what is shown meanwhile.

    Raises:
        RspruneError: if the model cannot be fetched or the folder cannot be written.
    """
    from rsprune.evaluate import perplexity
    from rsprune.run import compress
    from rsprune.sources import demo_model

    progress = progress or NullProgress()
    options = {"method": method, "pattern": pattern, "samples": samples, "seq_len": seq_len}
    config = Config.create(calibration=str(folder / "calibration.jsonl"), **options)
    config = config.model_copy(update={"calibration_field": "text"})
    folder.mkdir(parents=True, exist_ok=True)
    evaluation = write_texts(folder)
    progress.note(CAVEAT)
    model = demo_model(cache, progress.note)

    def measure(which: Path) -> Perplexity:
        return perplexity(which, evaluation, seq_len=seq_len, windows=windows, progress=progress)

    dense = measure(model)
    report = compress(model, folder / "model", config, overwrite=True, progress=progress)
    pruned = measure(report.folder)
    sizes = weight_bytes(model), weight_bytes(report.folder)
    return DemoResult(model, report, dense, pruned, *sizes)


def write_texts(folder: Path) -> Path:
    """Writes `calibration.jsonl` (a topic a line, so that windows are drawn from all of them) and
    `evaluation.txt` (the last quarter, which calibration never sees); returns the latter.
    """
    from rsprune.data import load_texts

    documents = load_texts(None).documents
    cut = len(documents) * 3 // 4
    lines = [json.dumps({"text": document}) + "\n" for document in documents[:cut]]
    (folder / "calibration.jsonl").write_text("".join(lines), encoding="utf-8")
    evaluation = folder / "evaluation.txt"
    evaluation.write_text(SEPARATOR.join(documents[cut:]), encoding="utf-8")
    return evaluation


def weight_bytes(folder: Path) -> int:
    """Length of a checkpoint's weight files."""
    from rsprune import _core

    files = set(_core.checkpoint_index(folder).values())
    return sum((folder / file).stat().st_size for file in files)


def demo_table(result: DemoResult) -> RenderableType:
    """Dense beside pruned, then where everything lies."""
    from rich.console import Group
    from rich.text import Text

    from rsprune.tables import certificate_table, new_table, size, summary_table

    dense, pruned, folder = result.dense, result.pruned, result.report.folder
    table = new_table("model", "perplexity", "weight files", "evaluation")
    for label, measured, count in (
        ("dense", dense, result.dense_bytes),
        ("pruned", pruned, result.pruned_bytes),
    ):
        row = f"{measured.perplexity:.2f}", size(count), f"{measured.seconds:.1f} s"
        table.add_row(label, *row)
    protocol = f"{pruned.windows} windows of {pruned.seq_len} tokens. {CAVEAT}"
    lines = [
        f"{protocol}\n",
        f"report:  {folder / 'rsprune-report.jsonl'}",
        f"check:   rsprune verify {folder}",
        "load:    with transformers alone, rsprune is not needed:",
        f"  AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto')",
    ]
    parts = [certificate_table(result.report), summary_table(result.report), table]
    return Group(*parts, Text("\n".join(lines)))
