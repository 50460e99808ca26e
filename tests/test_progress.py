"""Plain lines, JSON lines and the bar, each with a clock of the test's own."""

import io
import json
import sys

import pytest

from rsprune import progress as module
from rsprune.progress import (
    BarProgress,
    JsonProgress,
    LineProgress,
    NullProgress,
    duration,
    make_progress,
    rss_anon,
)


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_lines_are_rare_within_a_stage_but_each_stage_begins_and_ends():
    out, clock = io.StringIO(), Clock()
    progress = LineProgress(out, every=5.0, now=clock)
    progress.stage("layers", 100)
    for index in range(100):
        clock.time += 1.0
        progress.step(f"layer {index}", 0.25)
    progress.stage("write", 1)
    progress.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "layers: 100 steps"
    steps = [line for line in lines if line.startswith("layers ")]
    assert len(steps) == 20
    assert steps[0].startswith(
        "layers 5/100, layer 4, error 0.2500, 5.0 s elapsed, 1 min 35 s left"
    )
    assert "layers: 100 steps in 1 min 40 s" in lines
    assert lines[-1].startswith("write: 0 steps in")


def test_notes_are_printed_at_once():
    out = io.StringIO()
    LineProgress(out, every=1e9).note("field 'text' was guessed")
    assert out.getvalue() == "note: field 'text' was guessed\n"


def test_json_has_one_valid_object_a_line():
    out, clock = io.StringIO(), Clock()
    progress = JsonProgress(out, now=clock)
    progress.stage("layers", 2)
    clock.time += 3.0
    progress.step("layer 1/2 mlp.up_proj", float("nan"))
    progress.step("layer 1/2 mlp.down_proj", 0.5)
    progress.note("look here")
    progress.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    events = [json.loads(line, parse_constant=refuse) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["stage", "step", "step", "note"]
    assert events[1]["error"] is None
    assert events[1]["elapsed"] == 3.0
    assert events[1]["left"] == 3.0
    assert events[2]["error"] == 0.5
    assert (events[2]["done"], events[2]["total"]) == (2, 2)


def test_the_display_is_chosen_by_options_and_terminal(monkeypatch: pytest.MonkeyPatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert isinstance(make_progress(json=True, quiet=True), JsonProgress)
    assert isinstance(make_progress(json=False, quiet=True), NullProgress)
    assert isinstance(make_progress(json=False, quiet=False), LineProgress)
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    assert isinstance(make_progress(json=False, quiet=False), BarProgress)


def test_the_bar_shows_stage_detail_and_error_in_80_columns(monkeypatch: pytest.MonkeyPatch):
    from rich.console import Console

    out = io.StringIO()
    bar = BarProgress()
    bar._console = Console(file=out, force_terminal=True, width=80)
    bar.stage("layers", 210)
    bar.step("layer 3/30 mlp.down_proj", 0.0123)
    bar.note("[not markup] shown above")
    bar.close()
    bar.close()
    shown = out.getvalue()
    assert "layers" in shown
    assert "1/210" in shown
    assert "[not markup] shown above" in shown
    assert "layer 3/30 mlp.down_proj  error 0.0123" in shown


def test_memory_in_use_is_plausible():
    assert module.rss_anon is rss_anon
    assert 2**20 < rss_anon() < 2**40


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0.048, "48 ms"), (4.23, "4.2 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 05 min")],
)
def test_durations(seconds: float | None, text: str):
    assert duration(seconds) == text
