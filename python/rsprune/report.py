"""`rsprune-report.jsonl`: what a run did, one JSON object a line, written as the run goes.

Each line has a `kind`: run, allocation, removal, tensor, layer, file or summary. Of repeated lines
the last one counts. A report without its summary belongs to an unfinished run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from rsprune.errors import RspruneError

__all__ = ["REPORT_NAME", "Journal", "KindRow", "Report", "by_kind", "load_report"]

REPORT_NAME = "rsprune-report.jsonl"
DENSE = "dense"
"""The format of a weight that is not packed."""
KINDS = ("run", "allocation", "removal", "tensor", "layer", "file", "summary")
KEYS = {
    "tensor": "name",
    "layer": "layer",
    "file": "file",
    "removal": "iteration",
}  # what tells two lines of a kind apart
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "file", "dtype", "pattern", "residual", "scope"), (str,)),
    **dict.fromkeys(("sha256", "format"), (str,)),
    "shape": (list,),
    "scores": (dict,),
    "bytes": (int,),
    "stored_bytes": (int,),
    "true_bits": (float, int),
    "nominal_bits": (float, int),
    "packed_bits": (float, int),
    "sparsity": (float, int),
}
"""What a value must be, wherever it stands: a report is read from folders of strangers."""

Record = dict[str, Any]


class Journal:
    """The report of a run under way: each record is in the file when `write` returns."""

    def __init__(self, folder: Path) -> None:
        """Opens `<folder>/rsprune-report.jsonl` for append; the folder must exist."""
        self.path = folder / REPORT_NAME
        # Unbuffered: what a full disk refuses now must not be written again at `close`.
        self._file = self.path.open("a+b", buffering=0)
        self._drop_torn_line()

    def write(self, kind: str, **fields: Any) -> None:
        """Appends one line.

        Args:
            kind: one of `KINDS`.
            fields: anything that JSON has, NumPy scalars, paths and tuples; NaN becomes null.

        Raises:
            ValueError: on another kind; TypeError on a value that JSON cannot hold.
        """
        if kind not in KINDS:
            raise ValueError(f"record kind: expected one of {', '.join(KINDS)}, found {kind!r}")
        record = _plain({"kind": kind, **fields})
        line = json.dumps(record, sort_keys=True, allow_nan=False, ensure_ascii=False)
        length = self.path.stat().st_size
        try:
            write_whole(self._file, line.encode() + b"\n")
            if kind in ("layer", "removal"):
                os.fsync(self._file.fileno())  # from now on its shard, or its scores, count
        except OSError as error:
            self._file.truncate(length)
            raise RspruneError(f"{self.path}: write of a {kind} line: {error.strerror}") from None

    def close(self) -> None:
        """Puts the file on disk and closes it; `RspruneError` where the disk refuses."""
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RspruneError(f"{self.path}: fsync: {error.strerror}") from None
        finally:
            self._file.close()

    def _drop_torn_line(self) -> None:
        """Cuts what a killed process left of a line, so that the next record starts a line."""
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)


def write_whole(file: FileIO, data: bytes) -> None:
    """Writes all of `data` to an unbuffered file, or raises `OSError`."""
    while data:  # a full disk takes the first part, then says that it is full
        data = data[file.write(data) :]


def _plain(value: Any) -> Any:
    """`value` in the types that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()  # a NumPy or torch scalar
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class Report:
    """A report as read: records without their `kind`, in the order of their first appearance."""

    run: Record
    tensors: list[Record]
    layers: list[Record]
    summary: Record | None
    folder: Path
    files: list[Record] = field(default_factory=list)
    allocation: Record | None = None
    removals: list[Record] = field(default_factory=list)

    @property
    def packed(self) -> bool:
        """Whether a weight is stored in a form that only rsprune reads."""
        return any((record.get("format") or DENSE) != DENSE for record in self.tensors)

    @property
    def bits(self) -> str | None:
        """Bits of a weight that are really stored; None where the report is older than that.

        Nominal bits are those that a method is named after: what it counts of a weight.
        """
        linears = true_bits(self.tensors)
        if linears is None:
            return None
        text = f"{linears:.3f} of the pruned linears"
        parameters = (self.summary or {}).get("parameters")
        if parameters:
            whole = sum(record.get("bytes") or 0 for record in [*self.layers, *self.files])
            text += f", {whole * 8 / parameters:.3f} of the whole model"
        nominal = _mean_bits(self.tensors, "nominal_bits")
        return text if nominal is None else f"{text} (nominally {nominal:.3f} of the linears)"

    @property
    def packed_bits(self) -> float | None:
        """Bits a weight of all tensors together, packed, everything counted; None if not coded."""
        return _mean_bits(self.tensors, "packed_bits")

    @property
    def few_tokens(self) -> str | None:
        """A sentence on the experts that saw too few tokens for the run's method; None if none."""
        method = (self.run.get("config") or {}).get("method")
        few = [record for record in self.tensors if record.get("method", method) != method]
        if not few:
            return None
        counts = [record.get("tokens") or 0 for record in few]
        rules = ", ".join(sorted({str(record.get("method")) for record in few}))
        return (
            f"{len(few)} of {len(self.tensors)} tensors lie in experts that saw too few tokens "
            f"({min(counts)} to {max(counts)}) and were pruned by {rules} instead of {method}"
        )


def load_report(folder: str | Path) -> Report:
    """Reads the report in `folder`.

    Raises:
        RspruneError: naming the file, and the line where it has one, if the report is missing or
            is not what `Journal` writes.
    """
    path = Path(folder) / REPORT_NAME
    records = read_records(path)
    found: dict[str, dict[Any, Record]] = {kind: {} for kind in KINDS}
    for _, record in records:
        kind = record.pop("kind")
        found[kind][record[KEYS[kind]] if kind in KEYS else None] = record
    if not found["run"]:
        raise RspruneError(f"{path}: expected a record of kind run, found none in {len(records)}")
    tensors, layers, files, removals = (list(found[kind].values()) for kind in KEYS)
    summary, allocation = found["summary"].get(None), found["allocation"].get(None)
    run = found["run"][None]
    return Report(run, tensors, layers, summary, Path(folder), files, allocation, removals)


def read_records(path: Path) -> list[tuple[bytes, Record]]:
    """Every line of a report file with the record that it holds; raises as `load_report`."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RspruneError(f"{path}: the report cannot be read: {error.strerror}") from error
    return [(line, _parse(line, f"{path}, line {n}")) for n, line in enumerate(lines, start=1)]


def _parse(line: bytes, where: str) -> Record:
    """One line with a known kind and the key of that kind."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RspruneError(f"{where}: expected a JSON object, found bad JSON: {error}") from error
    if not isinstance(record, dict) or record.get("kind") not in KINDS:
        found = record.get("kind") if isinstance(record, dict) else record
        raise RspruneError(f"{where}: expected a kind of {', '.join(KINDS)}, found {found!r}")
    key = KEYS.get(record["kind"])
    if key is not None and not isinstance(record.get(key), (str, int)):
        raise RspruneError(f"{where}: expected {key!r} in a {record['kind']} record, found none")
    for name, kinds in TYPES.items():
        if not isinstance(record.get(name), (*kinds, type(None))):
            expected = kinds[0].__name__
            raise RspruneError(f"{where}: expected {expected} in {name!r}, found {record[name]!r}")
    return record


@dataclass(frozen=True)
class KindRow:
    """The tensors of one operator kind (such as `mlp.down_proj`), over all layers."""

    kind: str
    count: int
    error: float | None
    """Geometric mean of the relative errors on the calibration windows."""
    heldout_error: float | None
    """The same on windows that no solver saw."""
    sparsity: float
    """Zeros over weights."""
    seconds: float
    true_bits: float | None
    """Stored bits of a weight, everything counted that its packed form needs."""


def by_kind(tensors: Iterable[Mapping[str, Any]]) -> list[KindRow]:
    """Tensor records of a report, aggregated, kinds in the order of their first appearance."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in tensors:
        groups.setdefault(kind_of(record["name"]), []).append(record)
    return [_row(kind, records) for kind, records in groups.items()]


def kind_of(name: str) -> str:
    """`model.layers.3.mlp.down_proj.weight` -> `mlp.down_proj`; further numbers become `*`."""
    parts = name.removesuffix(".weight").split(".")
    layer = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if layer is not None and layer + 1 < len(parts):
        parts = parts[layer + 1 :]
    return ".".join("*" if part.isdigit() else part for part in parts)


def _row(kind: str, records: list[Mapping[str, Any]]) -> KindRow:
    sizes = [math.prod(record.get("shape") or [1]) for record in records]
    zeros = sum(
        size * (record.get("sparsity") or 0.0) for size, record in zip(sizes, records, strict=True)
    )
    return KindRow(
        kind=kind,
        count=len(records),
        error=geometric_mean(record.get("error") for record in records),
        heldout_error=geometric_mean(record.get("heldout_error") for record in records),
        sparsity=zeros / max(sum(sizes), 1),
        seconds=sum(record.get("seconds") or 0.0 for record in records),
        true_bits=true_bits(records),
    )


def true_bits(records: Iterable[Mapping[str, Any]]) -> float | None:
    """Stored bits of a weight, over tensor records; None if one does not say."""
    return _mean_bits(records, "true_bits")


def _mean_bits(records: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """The mean of `key` over weights."""
    bits = weights = 0.0
    for record in records:
        if record.get(key) is None or not record.get("shape"):
            return None
        count = math.prod(record["shape"])
        bits, weights = bits + record[key] * count, weights + count
    return bits / weights if weights else None


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are there: None if none is, 0 if one is 0."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if min(known) <= 0.0:
        return 0.0
    return math.exp(math.fsum(map(math.log, known)) / len(known))
