"""What a person or a machine sees while a run works: a live bar, plain lines, or JSON lines."""

from __future__ import annotations

import json as json_module
import sys
import time
from collections.abc import Callable, Iterable
from typing import IO, TYPE_CHECKING, Any, Protocol

from rsprune.memory import rss_anon

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["NullProgress", "Progress", "make_progress", "rss_anon"]

LINE_SECONDS = 5.0  # between two plain lines of one stage


class Progress(Protocol):
    """What a run tells while it works. Calls are cheap: once per tensor, not once per element."""

    def stage(self, name: str, total: int) -> None:
        """Begins a stage of `total` steps; the stage before is over."""

    def step(self, detail: str = "", error: float | None = None) -> None:
        """One step is done: what it was, and the relative layer error so far if there is one."""

    def note(self, message: str) -> None:
        """Something that the user must read, such as a guess that was made."""

    def close(self) -> None:
        """Ends the display. May be called twice."""


class NullProgress:
    """Shows nothing: for use as a library, and for `--quiet`."""

    def stage(self, name: str, total: int) -> None:
        """Shows nothing."""

    def step(self, detail: str = "", error: float | None = None) -> None:
        """Shows nothing."""

    def note(self, message: str) -> None:
        """Shows nothing."""

    def close(self) -> None:
        """Does nothing."""


def make_progress(*, json: bool, quiet: bool) -> Progress:
    """The display for this process.

    Args:
        json: one JSON object a line on stdout; wins over `quiet`, which then has nothing to hide.
        quiet: nothing at all (errors are raised, not shown here).

    Returns:
        A live bar where stderr is a terminal, else plain lines on stderr.
    """
    if json:
        return JsonProgress(sys.stdout)
    if quiet:
        return NullProgress()
    return BarProgress() if sys.stderr.isatty() else LineProgress(sys.stderr)


class _Clock:
    """Counts the steps of a stage and guesses from their pace how long the rest takes."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.name, self.total, self.done, self.begun = "", 0, 0, now()

    def start(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.begun = name, total, 0, self._now()

    def elapsed(self) -> float:
        return self._now() - self.begun

    def left(self) -> float | None:
        """Seconds; None before the first step."""
        if self.done == 0:
            return None
        return self.elapsed() / self.done * max(self.total - self.done, 0)


class LineProgress:
    """Plain lines: each begin and end of a stage, each note, and in between one every 5 seconds."""

    def __init__(
        self,
        stream: IO[str],
        *,
        every: float = LINE_SECONDS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._every, self._now = stream, every, now
        self._clock = _Clock(now)
        self._last = -every

    def stage(self, name: str, total: int) -> None:
        """Ends the stage before, begins the next."""
        self.close()
        self._clock.start(name, total)
        self._last = self._now()
        self._say(f"{name}: {total} steps")

    def step(self, detail: str = "", error: float | None = None) -> None:
        """Prints at most one line every few seconds."""
        clock = self._clock
        clock.done += 1
        if self._now() - self._last < self._every:
            return
        self._last = self._now()
        times = f"{duration(clock.elapsed())} elapsed, {duration(clock.left())} left"
        place = f"{clock.name} {clock.done}/{clock.total}"
        parts = [place, detail, _error(error), times, _memory()]
        self._say(", ".join(part for part in parts if part))

    def note(self, message: str) -> None:
        """Prints the message at once."""
        self._say(f"note: {message}")

    def close(self) -> None:
        """Ends the open stage."""
        clock = self._clock
        if clock.name:
            self._say(f"{clock.name}: {clock.done} steps in {duration(clock.elapsed())}")
        clock.start("", 0)

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class JsonProgress(NullProgress):
    """One JSON object a line: `event` is stage, step or note; times in seconds, memory in bytes."""

    def __init__(self, stream: IO[str], *, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = _Clock(now)

    def stage(self, name: str, total: int) -> None:
        """Writes the stage and its number of steps."""
        self._clock.start(name, total)
        self._write(event="stage", stage=name, total=total)

    def step(self, detail: str = "", error: float | None = None) -> None:
        """Writes every step: machines want all of them."""
        clock = self._clock
        clock.done += 1
        finite = error if error is not None and abs(error) < float("inf") else None
        times = {"elapsed": round(clock.elapsed(), 3), "left": round(clock.left() or 0.0, 3)}
        place = {"stage": clock.name, "done": clock.done, "total": clock.total}
        self._write(
            event="step", detail=detail, error=finite, rss_anon=rss_anon(), **place, **times
        )

    def note(self, message: str) -> None:
        """Writes the message."""
        self._write(event="note", message=message)

    def _write(self, **fields: Any) -> None:
        print(json_module.dumps(fields, sort_keys=True), file=self._stream, flush=True)


class BarProgress:
    """A live bar of rich on stderr, and under it the tensor and the error so far."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._detail = ""

    def stage(self, name: str, total: int) -> None:
        """Freezes the bar of the stage before and opens one for this stage."""
        self.close()
        self._bar = self._new_bar()
        self._task = self._bar.add_task(name, total=total, memory=_memory())
        self._bar.start()

    def step(self, detail: str = "", error: float | None = None) -> None:
        """Moves the bar."""
        if self._bar is None or self._task is None:
            return
        self._detail = "  ".join(part for part in (detail, _error(error)) if part)
        self._bar.update(self._task, advance=1, memory=_memory())

    def note(self, message: str) -> None:
        """Prints the message above the bar, where it stays."""
        self._console.print(f"note: {message}", markup=False, highlight=False)

    def close(self) -> None:
        """Stops the display; the last state of the bar stays on the screen."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._task, self._detail = None, None, ""

    def _new_bar(self) -> RichProgress:
        from rich import progress
        from rich.console import RenderableType
        from rich.text import Text

        outer = self

        class Bar(progress.Progress):
            """The detail has a line of its own: beside the bar it does not fit in 80 columns."""

            def get_renderables(self) -> Iterable[RenderableType]:
                yield from super().get_renderables()
                if outer._detail:
                    yield Text(f"  {outer._detail}", no_wrap=True, overflow="ellipsis")

        return Bar(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=16),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[memory]}", markup=False),
            console=self._console,
        )


def duration(seconds: float | None) -> str:
    """`48 ms`, `4.2 s`, `3 min 20 s` or `2 h 05 min`; `?` if not known."""
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _error(error: float | None) -> str:
    return "" if error is None else f"error {error:.4f}"


def _memory() -> str:
    bytes_held = rss_anon()
    return f"{bytes_held / 2**20:.0f} MiB" if bytes_held else ""
