"""Going on where a run ended. Its finished shards and its journal are all the state there is.

    another fingerprint     refused, naming the part that differs
    a broken shard          the layers from there on are done again
    hidden states           the finished layers run forward once more: the same bits, no solving

What a run may be killed in the middle of is either renamed into place or not there; a layer counts
as finished once its journal line stands and its shard has the checksum that the line names.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from rsprune import _core
from rsprune.calibrate import LayerJob
from rsprune.checkpoint import Checkpoint, sha256
from rsprune.config import Config
from rsprune.errors import RspruneError, UsageError
from rsprune.experts import ExpertLinear
from rsprune.output import OutputFolder
from rsprune.packing import PackedWeight
from rsprune.permute import Coupling, reorder
from rsprune.progress import Progress
from rsprune.report import DENSE, REPORT_NAME, Journal, Record, read_records
from rsprune.scratch import Scratch

FREE = ("memory", "threads", "device")
"""Options that change no bit of the result, or whose effect is a part of its own."""


def fingerprint(
    checkpoint: Checkpoint, windows: Tensor, config: Config, threads: int, device: str
) -> dict[str, Any]:
    """What must agree for two runs to give the same bytes, by the part that an error names."""
    return {
        **versions(),
        "instruction set": _core.kernel_name(),
        "threads": threads,
        "device": device,
        "calibration tokens": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "options": options_of(config),
        "model files": model_hashes(checkpoint),
    }


def options_of(config: Config) -> dict[str, Any]:
    """The options that a result depends on."""
    return {k: v for k, v in config.model_dump(mode="json").items() if k not in FREE}


def versions() -> dict[str, str]:
    """Of the software that has a part in the bits."""
    return {
        "rsprune": f"{_core.__version__}, build {_build()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@functools.cache
def _build() -> str:
    """Of this package's code: between two releases the version says nothing of what it computes."""
    home, total = Path(__file__).parent, hashlib.sha256()
    for path in sorted([*home.rglob("*.py"), Path(_core.__file__)]):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def model_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 by file: configuration, tokenizer, code, and whole shards, as a fine-tuned model may
    have the same headers."""
    folder = checkpoint.folder
    others = sorted(path.name for kind in ("tokenizer*", "*.py") for path in folder.glob(kind))
    return {name: sha256(folder / name) for name in ["config.json", *others, *checkpoint.files]}


def check_fingerprint(out: Path, recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to mix two runs.

    Raises:
        UsageError: naming the first part that differs, what stands there and what was asked for.
    """
    if found := difference(recorded, current):
        part, then, now = found
        raise UsageError(
            f"output {out}: an unfinished run lies beside it whose {part} differs: expected "
            f"{then!r}, found {now!r}; repeat that run to finish it, or pass --restart"
        )


def difference(
    recorded: Mapping[str, Any], current: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """The first part in which two fingerprints differ, what was recorded and what is now."""
    for part, now in current.items():
        then = recorded.get(part)
        if then == _plain(now):
            continue
        if isinstance(then, dict) and isinstance(now, dict):
            names = (k for k in {**now, **then} if then.get(k, "?") != _plain(now.get(k, "?")))
            name = next(names)
            part, then, now = f"{part}: {name}", then.get(name), now.get(name)
        return part, then, now
    return None


def _plain(value: Any) -> Any:
    """`value` as it comes back from a journal."""
    return json.loads(json.dumps(value))


def take_up(
    output: OutputFolder, own: dict[str, Any], first: Record, *, restart: bool
) -> tuple[Journal, list[Record]]:
    """Opens the journal: a new one, or that of the unfinished run that lies there.

    Args:
        output: its folder is cleared where nothing is gone on with.
        own: the fingerprint of this run.
        first: fields of the first line of a new journal.
        restart: whether what lies there is discarded.

    Returns:
        The journal, and the lines of an earlier run that still count; none for a new one.

    Raises:
        UsageError: another run lies there.
    """
    folder, records = output.folder, []
    if not restart and (folder / REPORT_NAME).exists():
        Journal(folder).close()  # cuts a torn line
        records = [record for _, record in read_records(folder / REPORT_NAME)]
    if not records:
        output.clear()
        journal = Journal(folder)
        journal.write("run", **first, fingerprint=own)
        return journal, []
    check_fingerprint(output.out, records[0].get("fingerprint", {}), own)
    kept = rewind(folder, finished(folder, records))
    return Journal(folder), [record for record in kept if record["kind"] != "run"]


def put_down(
    journal: Journal | None, output: OutputFolder, progress: Progress, *, kind: str, total: int
) -> None:
    """Closes a run that cannot go on; what is finished stays, for the next one.

    Args:
        journal: None where the run did not come to open it.
        output: is discarded where nothing is finished.
        progress: is told what stays.
        kind: of the journal's lines that are counted.
        total: how many of them a whole run has.
    """
    if journal is None:
        return
    with contextlib.suppress(RspruneError):  # the first error is the one to tell
        journal.close()
    if not (output.folder / REPORT_NAME).exists():
        return  # it has its name already
    records = [record for _, record in read_records(output.folder / REPORT_NAME)]
    if not any(record["kind"] in ("allocation", "removal", "layer") for record in records):
        output.discard()
        return
    count = sum(record["kind"] == kind for record in records)
    progress.note(
        f"{count} of {total} {kind}s are finished and stay in {output.folder}; "
        "the same command goes on from there"
    )


def finished(folder: Path, records: list[Record]) -> int:
    """How many layers, from the first on, are finished and whole on disk."""
    layers = {r["layer"]: r for r in records if r["kind"] == "layer"}
    count = 0
    while (record := layers.get(count)) is not None:
        path = folder / record["file"]
        if not path.is_file() or path.stat().st_size != record["bytes"]:
            break
        if sha256(path) != record["sha256"]:
            break
        count += 1
    return count


def rewind(folder: Path, layers: int) -> list[Record]:
    """Cuts the journal back to what the first `layers` layers wrote; returns it.

    A run that goes on then writes the lines that an undisturbed one would have written.
    """
    path = folder / REPORT_NAME
    kept = [
        (line, record)
        for line, record in read_records(path)
        if record["kind"] in ("run", "allocation", "removal")
        or record.get("layer", layers) < layers
    ]
    _core.write_file(path, b"".join(line + b"\n" for line, _ in kept))
    return [record for _, record in kept]


def packed_in(records: list[Record], layer: int) -> dict[str, PackedWeight]:
    """The packed weights of a finished layer, from the lines of its tensors."""
    found = {}
    for record in records:
        if record["layer"] == layer and record["format"] != DENSE:
            rows, columns = record["shape"]
            found[record["name"]] = PackedWeight(record["format"], record["dtype"], (rows, columns))
    return found


def replay(
    job: LayerJob,
    shard: Path,
    packed: Mapping[str, PackedWeight],
    names: Mapping[str, str],
    record: Record,
    scratch: Scratch | None,
) -> None:
    """Runs a finished layer over all windows again, as it was run when it was pruned.

    Args:
        job: the layer's way through the windows, its dense weights in memory.
        shard: what the layer was stored as.
        packed: which of its weights are packed, and how.
        names: parameter name in the layer -> on-disk name.
        record: the layer's line in the journal.
        scratch: keeps permuted and stored weights of experts; None where the layer has none.
    """
    for moved in record.get("permutations", ()):
        coupling = Coupling(
            tuple(moved["producers"]), moved["consumer"], moved["segment"], moved["repeats"]
        )
        reorder(job.layer, coupling, torch.tensor(moved["order"]), scratch)
    stored = Checkpoint(shard.parent, {shard.name: _core.Shard(shard)}, packed)

    def value(name: str) -> Tensor:
        tensor = stored.read(names[name])
        of_expert = isinstance(job.layer.get_submodule(name.rpartition(".")[0]), ExpertLinear)
        return scratch.keep_tensor(tensor) if of_expert and scratch else tensor

    job.replay((name, value(name)) for name, _ in job.layer.named_parameters())
