"""Other people's code at work on a checkpoint's own files: what it raises is a refusal.

Configuration classes, model classes and tokenizers were written for files that their authors made.
Given hostile ones they raise anything at all, and the Rust inside of tokenizers panics.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import IO

from rsprune.errors import RspruneError, UsageError, one_line

__all__ = ["refusing", "refusing_panics"]

STDERR = 2


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns whatever the block raises into one line that begins with `what`.

    Raises:
        UsageError: in place of any other error; the cause is kept for RSPRUNE_DEBUG.
    """
    try:
        yield
    except RspruneError:
        raise
    except Exception as error:
        raise UsageError(f"{what}: {one_line(error)}") from error


@contextlib.contextmanager
def refusing_panics(what: str) -> Iterator[None]:
    """As `refusing`, for blocks in which Rust may panic: its report to stderr is dropped, too."""
    with refusing(what), _stderr_held_back() as held:
        try:
            yield
        except BaseException as error:
            if not is_panic(error):
                raise
            held.truncate(0)
            raise UsageError(f"{what}: {one_line(error)}") from error


def is_panic(error: BaseException) -> bool:
    """Whether `error` is a Rust panic: no `Exception`, and each module of Rust has its own type."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def _stderr_held_back() -> Iterator[IO[bytes]]:
    """Collects what the process writes to stderr, and passes on at the end what is left of it."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        saved = os.dup(STDERR)
        try:
            os.dup2(held.fileno(), STDERR)
            yield held
        finally:
            sys.stderr.flush()
            os.dup2(saved, STDERR)
            os.close(saved)
            held.seek(0)
            with contextlib.suppress(OSError):
                os.write(STDERR, held.read())
