"""Is this folder complete, loadable, in pattern, and what its report says? Every byte is read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsprune import _core
from rsprune.checkpoint import Checkpoint, TensorInfo, sha256
from rsprune.errors import RspruneError, UsageError
from rsprune.inspect import count_zeros, matrix_view
from rsprune.packing import linear_of
from rsprune.report import DENSE, REPORT_NAME, Record, Report, load_report

__all__ = ["Problem", "verify"]

INDEX_NAME = "model.safetensors.index.json"
# Each alternative is enough for one of the tokenizer classes of transformers.
TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("vocab.txt",),
    ("sentencepiece.bpe.model",),
)


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be."""

    where: str
    """The file or the tensor."""
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, found {self.found}"


def verify(folder: str | Path, *, allow_plain: bool = False) -> list[Problem]:
    """Checks an output folder against itself, its report and its architecture.

    Args:
        folder: the folder that a run wrote.
        allow_plain: whether a folder without a report (not ours) is fine as far as it goes.

    Returns:
        The problems, none if all is well.

    Raises:
        RspruneError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RspruneError(f"{folder}: expected a folder, found none")
    checkpoint, problems = _open_checkpoint(folder)
    problems += _leftovers(folder)
    problems += _config(folder)
    problems += _tokenizer(folder)
    if allow_plain and not (folder / REPORT_NAME).exists():
        report = None
    else:
        report, unreadable = _open_report(folder)
        problems += unreadable
    if report is not None:
        problems += _unfinished(report)
        problems += _files(report)
        problems += _tensors(report, checkpoint)
    elif checkpoint is not None:
        problems += _packed(checkpoint)
    if checkpoint and not any(problem.where == "config.json" for problem in problems):
        problems += _architecture(folder)
    return problems


def _open_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[Problem]]:
    """Opening validates the header of every shard, and that all parts of packed weights are there:
    what is missing would be initialised at random.
    """
    try:
        return Checkpoint.open(folder), []
    except UsageError as error:
        return None, [Problem("weights", "a complete checkpoint", str(error))]


def _leftovers(folder: Path) -> Iterator[Problem]:
    for path in sorted(folder.rglob("*.tmp")):
        where = str(path.relative_to(folder))
        yield Problem(where, "no temporary file", "one that a killed run left")


def _config(folder: Path) -> Iterator[Problem]:
    try:
        content = json.loads((folder / "config.json").read_bytes())
    except OSError as error:
        yield Problem("config.json", "a file", error.strerror or str(error))
    except (ValueError, RecursionError) as error:
        yield Problem("config.json", "valid JSON", str(error))
    else:
        if not isinstance(content, dict):
            yield Problem("config.json", "a JSON object", type(content).__name__)


def _tokenizer(folder: Path) -> Iterator[Problem]:
    if any(folder.glob("*.tiktoken")):
        return
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        expected = "one of " + ", ".join(" + ".join(names) for names in TOKENIZERS)
        yield Problem("tokenizer", expected, "none")


def _open_report(folder: Path) -> tuple[Report | None, list[Problem]]:
    try:
        return load_report(folder), []
    except RspruneError as error:
        return None, [Problem(REPORT_NAME, "the report of a run", str(error))]


def _unfinished(report: Report) -> Iterator[Problem]:
    if report.summary is None:
        yield Problem(REPORT_NAME, "a summary line", "none: unfinished run")


def _files(report: Report) -> Iterator[Problem]:
    """Length and hash of every weight file that the report names."""
    for record in [*report.layers, *report.files]:
        name = record.get("file")
        if not name:
            continue
        path = report.folder / name
        if path.name != name:
            yield Problem(name, "a file of this folder", "a path out of it")
            continue
        if not path.is_file():
            yield Problem(name, "a file of the report", "none")
            continue
        size = path.stat().st_size
        if record.get("bytes") is not None and size != record["bytes"]:
            yield Problem(name, f"{record['bytes']} bytes", f"{size} bytes")
        elif record.get("sha256") is not None:
            digest = sha256(path)
            if digest != record["sha256"]:
                yield Problem(name, f"sha256 {record['sha256']}", digest)


def _tensors(report: Report, checkpoint: Checkpoint | None) -> Iterator[Problem]:
    """Every tensor that the report says was pruned, one in memory at a time."""
    if checkpoint is None:
        return
    for record in report.tensors:
        name, packed = record["name"], checkpoint.packed.get(record["name"])
        expected, found = record.get("format") or DENSE, packed.format if packed else DENSE
        if name in checkpoint.tensors and expected == found:
            yield from _tensor(checkpoint, record)
        elif expected == DENSE and found == DENSE:
            yield Problem(name, "a tensor of the checkpoint", "none")
        else:
            yield Problem("config.json", f"{expected} for {linear_of(name)}", found)


def _packed(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Packed weights of which no report says more than that they are packed."""
    for name in checkpoint.packed:
        try:
            checkpoint.raw(name)
        except RspruneError as error:
            yield Problem(name, "parts that can be unpacked", str(error))


def _tensor(checkpoint: Checkpoint, record: Record) -> Iterator[Problem]:
    name, info = record["name"], checkpoint.tensors[record["name"]]
    if list(record.get("shape") or []) != list(info.shape):
        yield Problem(name, f"shape {record.get('shape')}", f"{list(info.shape)}")
        return
    if record.get("dtype") != info.dtype:
        yield Problem(name, f"dtype {record.get('dtype')}", info.dtype)
        return
    try:
        raw = checkpoint.raw(name)
    except RspruneError as error:
        yield Problem(name, "parts that can be unpacked", str(error))
        return
    weights = math.prod(info.shape)
    zeros, _ = count_zeros(raw, info.dtype, weights, 0)
    expected = record.get("sparsity")
    if expected is not None and abs(expected * weights - zeros) > 0.5:
        yield Problem(name, f"sparsity {expected:.6f}", f"{zeros / weights:.6f}")
    yield from _pattern(record, raw, info)


def _pattern(record: Record, raw: NDArray[np.uint8], info: TensorInfo) -> Iterator[Problem]:
    text = record.get("pattern")
    if not text:
        return
    try:
        pattern = _core.Pattern(text, record.get("scope") or "row")
        holds = pattern.holds(matrix_view(raw, info.dtype, info.shape), info.dtype)
    except ValueError as error:
        yield Problem(record["name"], f"pattern {text}", str(error))
    else:
        if not holds:
            yield Problem(record["name"], f"pattern {text}", "groups or rows with too few zeros")


def _architecture(folder: Path) -> Iterator[Problem]:
    """Tensors that the model class needs and the files lack would be initialised at random."""
    from rsprune.skeleton import missing_tensors

    try:
        missing = missing_tensors(folder)
    except (RspruneError, OSError) as error:
        yield Problem("config.json", "a model class that transformers knows", str(error))
    else:
        for name in missing:
            yield Problem(name, "a tensor that the architecture needs", "none")
