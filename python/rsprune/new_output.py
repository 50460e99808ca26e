"""Outputs that are written at one go: exports."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rsprune.errors import UsageError
from rsprune.output import OutputFolder, free_bytes

__all__ = ["new_output"]


@contextlib.contextmanager
def new_output(out: Path, needed: int, *, overwrite: bool) -> Iterator[OutputFolder]:
    """An empty output that is discarded where the block fails, for what is too short to resume.

    A killed one is cleared by the next; an unfinished run that lies there is refused.

    Args:
        out: the folder; see `check_output`.
        needed: bytes that will be written.
        overwrite: whether `out` may exist.

    Raises:
        UsageError: there is too little room, or an unfinished run lies there.
    """
    if needed > (free := free_bytes(out)):
        raise UsageError(f"output {out}: needs {needed} bytes on disk, found {free} bytes free")
    output = OutputFolder(out, overwrite=overwrite)
    with output.owned():
        output.begin("export")
        try:
            yield output
        except BaseException:
            output.discard()
            raise
