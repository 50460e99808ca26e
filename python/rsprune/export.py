"""A packed folder written as something else: an ordinary dense checkpoint.

Folders with replaced layers go through `rsprune.flexi.dense`.
"""

from __future__ import annotations

from pathlib import Path

from rsprune.card import model_card
from rsprune.checkpoint import Checkpoint
from rsprune.errors import UsageError
from rsprune.new_output import new_output
from rsprune.output import OutputFolder, check_output
from rsprune.progress import NullProgress, Progress
from rsprune.replaced import says_blocks
from rsprune.report import DENSE, REPORT_NAME, Journal, Report, load_report


def export_dense(
    folder: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a packed folder as an ordinary checkpoint with the same weights, bit for bit.

    Shard by shard, one unpacked weight in memory at a time. The folder appears when it is whole.

    Args:
        folder: a folder with packed linears.
        out: the folder to write.
        overwrite: whether `out` may exist, if rsprune has written it.
        progress: what is told how far it is.

    Raises:
        UsageError: nothing is packed in `folder`; `out` exists, or has no room.
        RspruneError: a packed weight is broken, or a file cannot be read or written.
    """
    folder, out = Path(folder), Path(out)
    if says_blocks(folder):
        from rsprune.flexi.dense import export_expanded

        export_expanded(folder, out, overwrite=overwrite, progress=progress)
        return
    check_output(out, folder, overwrite=overwrite)
    checkpoint = Checkpoint.open(folder)
    if not checkpoint.packed:
        raise UsageError(f"{folder}: expected packed linears to unpack, found none in config.json")
    needed = sum(info.nbytes for info in checkpoint.tensors.values())
    report = load_report(folder) if (folder / REPORT_NAME).exists() else None
    with new_output(out, needed, overwrite=overwrite) as output:
        _write(checkpoint, report, output, progress or NullProgress())


def _write(
    checkpoint: Checkpoint, report: Report | None, output: OutputFolder, progress: Progress
) -> None:
    shards: dict[str, list[str]] = {}
    for info in checkpoint.tensors.values():
        shards.setdefault(info.file, []).append(info.name)
    progress.stage("export", len(shards))
    records = []
    for number, (file, names) in enumerate(sorted(shards.items()), start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        records.append(output.put_shard(name, checkpoint, names, {}))
        progress.step(file)
    output.copy_other_files(checkpoint.folder)
    output.write_config()
    if report is not None:
        _write_report(report, records, output)
    output.write_index()
    output.commit()


def _write_report(report: Report, records: list[dict[str, object]], output: OutputFolder) -> None:
    """What the run has found out, with the sizes and files of now; and the card that says so."""
    journal = Journal(output.folder)
    journal.write("run", **report.run)
    stored = 0
    for record in report.tensors:
        rows, columns = record["shape"]
        nbytes = rows * columns * (4 if record["dtype"] == "F32" else 2)
        stored += nbytes
        size = {"format": DENSE, "stored_bytes": nbytes, "true_bits": nbytes * 8 / rows / columns}
        journal.write("tensor", **record | size)
    for each in records:
        journal.write("file", **each)
    summary = report.summary or {}
    sizes = {"bytes_written": output.total_bytes, "stored_bytes": stored}
    journal.write("summary", **summary | sizes)
    journal.close()
    card = report.folder / "README.md"
    source_card = card.read_text("utf-8", errors="replace") if card.exists() else None
    base_model = str(report.run.get("model"))
    text = model_card(load_report(output.folder), source_card=source_card, base_model=base_model)
    output.write_text("README.md", text)
