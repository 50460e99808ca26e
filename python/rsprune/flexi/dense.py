"""An ordinary checkpoint out of shared and factored layers.

    shared      W = diag(g) W_j + B A
    factored    W = B A

Each is then as large as any layer, and rounded to its stored type, so the model is the same up to
that rounding. A map behind a layer acts on the residual stream, and so does the published
normalisation: no layer of a stock class does either, and both are refused by name.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rsprune.checkpoint import Checkpoint
from rsprune.errors import UsageError
from rsprune.flexi.card import flexi_card
from rsprune.flexi.positions import NAMES, prefix_of
from rsprune.new_output import new_output
from rsprune.output import OutputFolder, check_output
from rsprune.progress import NullProgress, Progress
from rsprune.replaced_layers import LowRank, SharedLinear
from rsprune.report import REPORT_NAME, Journal, Report, load_report
from rsprune.skeleton import Skeleton


def export_expanded(
    folder: Path, out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Writes a folder with replaced layers as an ordinary checkpoint, a weight in memory at a time.

    Raises:
        UsageError: a layer cannot be an ordinary one, naming it; `out` exists, or has no room.
    """
    check_output(out, folder, overwrite=overwrite)
    skeleton = Skeleton(Checkpoint.open(folder))
    refuse(skeleton, folder)
    checkpoint = skeleton.checkpoint
    sizes = sum(p.numel() for p in skeleton.model.parameters())
    widest = max(p.element_size() for p in (torch.empty(0, dtype=t) for t in _types(skeleton)))
    report = load_report(folder) if (folder / REPORT_NAME).exists() else None
    with new_output(out, sizes * widest, overwrite=overwrite) as output:
        _write(skeleton, checkpoint, report, output, progress or NullProgress())


def refuse(skeleton: Skeleton, folder: Path) -> None:
    """Raises `UsageError` for the first layer that no stock class has."""
    for index, block in sorted(skeleton.blocks.items()):
        reason = None
        if block.maps:
            reason = "a linear map of the residual stream behind it (option replace: map)"
        elif block.normalised:
            reason = "its output normalised as published (flexigpt_mode: faithful)"
        if reason is not None:
            raise UsageError(
                f"{folder}: layer {index} has {reason}, which no ordinary decoder layer computes; "
                "expected only shared and factored layers, as of option replace: fold,shared,own"
            )


def _types(skeleton: Skeleton) -> set[torch.dtype]:
    return {skeleton.stored_dtype(name) for name, _ in skeleton.model.named_parameters()}


def _write(
    skeleton: Skeleton, checkpoint: Checkpoint, report: Report | None, output: OutputFolder,
    progress: Progress,
) -> None:  # fmt: skip
    files = sorted({info.file for info in checkpoint.tensors.values()})
    merged = {name: index for index in skeleton.blocks for name in _replaced_names(skeleton, index)}
    progress.stage("export", len(files))
    records = []
    for number, file in enumerate(files, start=1):
        names = [n for n, info in checkpoint.tensors.items() if info.file == file]
        copied = {name: name for name in names if name not in merged}
        new: dict[str, tuple[str, Tensor]] = {}
        for index in sorted({merged[name] for name in names if name in merged}):
            for name, value in _merged(skeleton, index).items():
                new[name] = (NAMES[value.dtype], value)
        shard = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        records.append(output.put_tensors(shard, checkpoint, copied, new))
        progress.step(file)
    output.copy_other_files(checkpoint.folder)
    output.write_config()
    if report is not None:
        _write_report(report, records, output)
    output.write_index()
    output.commit()


def _replaced_names(skeleton: Skeleton, index: int) -> list[str]:
    """On-disk tensors of a replaced layer's linears, which go."""
    found = []
    for name, module in _linears(skeleton, index).items():
        for leaf, parameter in module.named_parameters():
            if isinstance(module, SharedLinear) and parameter is module.weight:
                continue  # it belongs to the source
            on_disk = skeleton.disk_name(skeleton.layer_name(index, f"{name}.{leaf}"))
            assert on_disk is not None
            found.append(on_disk)
    return found


def _linears(skeleton: Skeleton, index: int) -> dict[str, SharedLinear | LowRank]:
    layer = skeleton.layers[index]
    shared = {n: m for n, m in layer.named_modules() if isinstance(m, SharedLinear)}
    if shared:
        return dict(shared)
    return {n: m for n, m in layer.named_modules() if isinstance(m, LowRank)}


def _merged(skeleton: Skeleton, index: int) -> dict[str, Tensor]:
    """The ordinary weights and biases of a replaced layer, by on-disk name, as stored."""
    found = {}
    for name, module in _linears(skeleton, index).items():

        def stored(leaf: str, name: str = name) -> Tensor:
            return skeleton.stored(skeleton.layer_name(index, f"{name}.{leaf}"))

        if isinstance(module, SharedLinear):
            weight = stored("weight")
            dtype, value = weight.dtype, weight.float()
            if module.gain is not None:
                value = stored("gain").float()[:, None] * value
            if module.adapter is not None:
                a, b = (stored(f"adapter.lora_{leaf}.weight").float() for leaf in "AB")
                value = value + b @ a
            bias = stored("bias") if module.bias is not None else None
        else:
            a, b = stored("lora_A.weight"), stored("lora_B.weight")
            dtype, value = b.dtype, b.float() @ a.float()
            bias = stored("lora_B.bias") if module.lora_B.bias is not None else None
        prefix = f"{prefix_of(skeleton, index, index)}{name}"
        found[f"{prefix}.weight"] = value.to(dtype)
        if bias is not None:
            found[f"{prefix}.bias"] = bias
    return found


def _write_report(report: Report, records: list[dict[str, object]], output: OutputFolder) -> None:
    """What the run has found out, with the files of now; and the card that says so."""
    journal = Journal(output.folder)
    journal.write("run", **report.run)
    for record in report.removals:
        journal.write("removal", **record)
    for record in report.layers:
        journal.write("layer", layer=record["layer"], blocks=record.get("blocks", []))
    for each in records:
        journal.write("file", **each)
    summary = report.summary or {}
    journal.write("summary", **{**summary, "bytes_written": output.total_bytes})
    journal.close()
    card = report.folder / "README.md"
    source_card = card.read_text("utf-8", errors="replace") if card.exists() else None
    text = flexi_card(load_report(output.folder), source_card, str(report.run.get("model")))
    output.write_text("README.md", text)
