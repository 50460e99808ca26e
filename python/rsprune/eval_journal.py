"""Results of an evaluation as they come, so that one that is killed can go on where it was.

    {"fingerprint": {...}}      what must agree for two evaluations to give the same bits
    {"window 0": 4127.25}       a result by its name

A line counts when it is whole. Another fingerprint is refused, naming the part that differs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from rsprune import _core
from rsprune.errors import RspruneError, UsageError
from rsprune.report import write_whole
from rsprune.resume import difference, model_hashes, versions
from rsprune.skeleton import Skeleton


def fingerprint(skeleton: Skeleton, **measured: Any) -> dict[str, Any]:
    """What must agree for two evaluations to give the same bits.

    Batches and threads are not in it: results do not depend on them.

    Args:
        measured: what is asked of the model, by the part that an error names.
    """
    return {
        **versions(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "device": str(skeleton.device),
        **measured,
        "model files": model_hashes(skeleton.checkpoint),
    }


class Journal:
    """An open journal.

    Attributes:
        finished: results by name, those of earlier runs too.
    """

    def __init__(self, file: FileIO | None, finished: dict[str, Any]) -> None:
        self._file = file
        self.finished = finished

    def write(self, name: str, result: Any) -> None:
        """Notes a result; it is in the file (if there is one) when this returns.

        Raises:
            RspruneError: the file cannot be written.
        """
        self.finished[name] = result
        if self._file is None:
            return
        try:
            write_whole(self._file, json.dumps({name: result}, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise RspruneError(f"{self._file.name}: writing: {error.strerror}") from None


@contextlib.contextmanager
def open_journal(path: Path | None, current: dict[str, Any]) -> Iterator[Journal]:
    """Goes on with the journal in `path`, or begins it.

    Args:
        path: the file; None keeps results in memory alone.
        current: the fingerprint of this evaluation.

    Raises:
        UsageError: the file is something else, belongs to another evaluation, or is in use.
        RspruneError: a line of it cannot be read.
    """
    if path is None:
        yield Journal(None, {})
        return
    if not path.exists():
        line = json.dumps({"fingerprint": current}, sort_keys=True)
        _core.write_file(path, line.encode() + b"\n")
    with path.open("r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"resume {path}: another evaluation is writing to it") from None
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]  # a killed process may leave a torn line
        finished = _finished(path, whole.splitlines(), current)
        file.seek(file.truncate(len(whole)))
        yield Journal(file, finished)
        os.fsync(file.fileno())


def _finished(path: Path, lines: list[bytes], current: Mapping[str, Any]) -> dict[str, Any]:
    """The results in a journal, which must have the fingerprint `current`."""
    if not lines or not lines[0].startswith(b'{"fingerprint"'):
        raise UsageError(f"resume {path}: expected a journal of `rsprune eval`, found another file")
    records = [_record(f"resume {path}, line {n}", line) for n, line in enumerate(lines, start=1)]
    if found := difference(records[0]["fingerprint"], current):
        part, then, now = found
        raise UsageError(
            f"resume {path}: belongs to an evaluation whose {part} differs: expected {then!r}, "
            f"found {now!r}; repeat that one, or give another file"
        )
    return {name: result for record in records[1:] for name, result in record.items()}


def _record(where: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RspruneError(f"{where}: expected a JSON object, found bad JSON: {error}") from None
    if not isinstance(record, dict):
        raise RspruneError(f"{where}: expected a JSON object, found {record!r}")
    return record
