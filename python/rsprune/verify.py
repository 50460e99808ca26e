"""Is this folder complete, loadable, in pattern, and what its report says? Every byte is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rsprune import _core
from rsprune.errors import RspruneError
from rsprune.inspect import count_zeros, matrix_view
from rsprune.report import REPORT_NAME, Record, Report, load_report

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
    index, problems = _open_index(folder)
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
        problems += _tensors(report, index)
    if index and not any(problem.where == "config.json" for problem in problems):
        problems += _architecture(folder)
    return problems


def _open_index(folder: Path) -> tuple[dict[str, str], list[Problem]]:
    """Tensor -> file; opening it validates the header of every shard."""
    try:
        return _core.checkpoint_index(folder), []
    except (OSError, ValueError, KeyError) as error:
        return {}, [Problem("weights", "a complete checkpoint", str(error))]


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
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != record["sha256"]:
                yield Problem(name, f"sha256 {record['sha256']}", digest)


def _tensors(report: Report, index: dict[str, str]) -> Iterator[Problem]:
    """Every tensor that the report says was pruned, one in memory at a time."""
    by_file: dict[str, list[Record]] = {}
    for record in report.tensors:
        if record["name"] in index:
            by_file.setdefault(index[record["name"]], []).append(record)
        else:
            yield Problem(record["name"], "a tensor of the checkpoint", "none")
    for file, records in by_file.items():
        shard = _core.Shard(report.folder / file)
        stored = {name: (dtype, shape) for name, dtype, shape, _ in shard.tensors()}
        for record in records:
            dtype, shape = stored[record["name"]]
            yield from _tensor(shard, record, dtype, list(shape))


def _tensor(shard: _core.Shard, record: Record, dtype: str, shape: list[int]) -> Iterator[Problem]:
    name = record["name"]
    if list(record.get("shape") or []) != shape:
        yield Problem(name, f"shape {record.get('shape')}", f"{shape}")
        return
    if record.get("dtype") != dtype:
        yield Problem(name, f"dtype {record.get('dtype')}", dtype)
        return
    raw = shard.map(name)
    weights = math.prod(shape)
    zeros, _ = count_zeros(np.frombuffer(memoryview(raw), np.uint8), dtype, weights, 0)
    expected = record.get("sparsity")
    if expected is not None and abs(expected * weights - zeros) > 0.5:
        yield Problem(name, f"sparsity {expected:.6f}", f"{zeros / weights:.6f}")
    yield from _pattern(record, raw, dtype, shape)


def _pattern(record: Record, raw: Any, dtype: str, shape: list[int]) -> Iterator[Problem]:
    text = record.get("pattern")
    if not text:
        return
    try:
        pattern = _core.Pattern(text, record.get("scope") or "row")
        holds = pattern.holds(matrix_view(raw, dtype, shape), dtype)
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
