"""Tests that run in a process of their own, whose system calls `device_errors.c` lets fail."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rsprune.errors import RspruneError

SOURCE = Path(__file__).with_name("device_errors.c")
NEVER = 1 << 40


class Device:
    """The preloaded library, in the process that it was preloaded into."""

    def __init__(self, error: int) -> None:
        self._library: Any = ctypes.CDLL(None)
        self._library.fail.argtypes = [
            ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_int
        ]  # fmt: skip
        self._library.calls.restype = ctypes.c_long
        self._error = error

    def fail(self, calls: str, path: str, after: int) -> None:
        """`calls` (words) on files whose path contains `path` fail from number `after` on."""
        self._library.fail(calls.encode(), path.encode(), after, self._error)

    def count(self, calls: str, path: str) -> None:
        """They are counted, and none fails."""
        self.fail(calls, path, NEVER)

    def calls(self) -> int:
        """How many there were since then."""
        found: int = self._library.calls()
        return found

    def mend(self) -> None:
        """Nothing fails any more."""
        self.fail("", "", NEVER)


def attempt(work: Callable[[], object]) -> str:
    """What the error of `work` says."""
    try:
        work()
    except (RspruneError, OSError) as error:
        return str(error)
    return "no error"


def run_preloaded(module: str, paths: list[Path], folder: Path) -> dict[str, Any]:
    """Calls `child(*paths)` of a test module in a process with the library; what it has printed.

    Args:
        module: its name.
        paths: arguments.
        folder: where the library is built.
    """
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux")
    library = folder / "device_errors.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    words = ", ".join(f"Path({str(path)!r})" for path in paths)
    code = f"from pathlib import Path; import {module} as t; t.child({words})"
    search = os.pathsep.join([str(SOURCE.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": search, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
