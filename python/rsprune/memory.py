"""Memory of this process and what the system leaves to it."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import psutil


def rss_anon() -> int:
    """Anonymous resident bytes of this process (`RssAnon`); all resident bytes elsewhere."""
    return _status("RssAnon") or int(psutil.Process().memory_info().rss)


def memory_limit() -> int:
    """90 % of what this process may still come to use, as the machine and its cgroups allow."""
    free = psutil.virtual_memory().available + rss_anon()
    return int(0.9 * min([free, *cgroup_limits()]))


def cgroup_limits(root: Path = Path("/")) -> list[int]:
    """Memory limits of this process's cgroup and all above it, of version 1 and 2, in bytes.

    In a container its own group is the root of what is mounted; the path that the kernel names may
    then be absent, and the groups above it that are there count.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        found = (_number(root / mount / above / name) for above in (group, *group.parents))
        limits += [limit for limit in found if limit is not None]
    return limits


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None  # absent, or "max"


KEPT_BYTES = 128 * 2**20
"""Freed memory that the allocator may keep."""


def keep_freed_pages() -> None:
    """Lets glibc keep `KEPT_BYTES` of freed memory instead of giving every tensor's pages back.

    torch frees and allocates the same activations layer after layer; without this each of their
    pages is faulted in anew (a decoder layer's forward took up to twice as long).
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 64 * 2**20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, KEPT_BYTES)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        return  # not glibc: nothing to tune


def give_freed_pages_back() -> None:
    """Returns the holes of the heap to the system; called between decoder layers.

    glibc's aligned allocations leave holes that do not fit the next layer's tensors exactly;
    without this resident memory crept up by 3 to 5 MB a layer.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc: nothing to give back


class PeakWatch:
    """Samples `RssAnon` five times a second; `peak` is the highest value seen."""

    def __init__(self) -> None:
        self.peak = rss_anon()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()

    def sample(self) -> int:
        """Takes one sample now and returns it."""
        now = rss_anon()
        self.peak = max(self.peak, now)
        return now

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self.sample()
