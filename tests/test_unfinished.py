"""What lies where an output is built: nobody's hours are thrown away, nothing is in the way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from rsprune import Config, export_dense
from rsprune.errors import RspruneError, UsageError
from rsprune.output import MARK, OutputFolder
from rsprune.report import REPORT_NAME, Journal
from rsprune.resume import put_down
from rsprune.run import compress


@pytest.fixture(scope="module")
def packed(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    compress(tiny("llama"), out, Config.create(method="magnitude", format="packed", threads=1))
    return out


def test_an_export_does_not_throw_an_unfinished_run_away(packed: Path, tmp_path: Path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    journal = Journal(partial)
    journal.write("run", fingerprint={})
    journal.close()
    (partial / "model-00001-of-00004.safetensors").write_bytes(b"hours")
    with pytest.raises(UsageError, match=r"unfinished run lies in .*out\.partial; repeat it"):
        export_dense(packed, tmp_path / "out")
    assert (partial / "model-00001-of-00004.safetensors").read_bytes() == b"hours"


@pytest.mark.parametrize("report", [False, True])
def test_a_killed_export_is_in_nobodys_way(packed: Path, tmp_path: Path, report: bool):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / MARK).write_text("export\n")
    (partial / "model-00001-of-00004.safetensors").write_bytes(b"half")
    if report:
        (partial / REPORT_NAME).write_text("{}\n")
    export_dense(packed, tmp_path / "out")
    assert not list(tmp_path.glob("out.*"))
    assert not (tmp_path / "out" / MARK).exists()


def test_what_shows_whose_a_folder_is_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A kill in the middle of clearing leaves what the next run may clear."""
    output = OutputFolder(tmp_path / "out")
    names = [REPORT_NAME, "a.safetensors", "z.safetensors"]
    for name in names:
        (output.folder / name).write_text("")
    removed: list[str] = []
    monkeypatch.setattr(Path, "unlink", lambda path: removed.append(path.name))
    output.clear()
    assert sorted(removed) == sorted(names)
    assert removed[-1] == REPORT_NAME


class Notes:
    """Takes what a user is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("kind", ["allocation", "removal", "layer"])
def test_an_end_keeps_whatever_is_finished(tmp_path: Path, kind: str):
    output, notes = OutputFolder(tmp_path / "out"), Notes()
    journal = Journal(output.folder)
    journal.write("run", fingerprint={})
    journal.write(
        kind, **{"allocation": {}, "removal": {"iteration": 0}, "layer": {"layer": 0}}[kind]
    )
    progress: Any = notes
    put_down(journal, output, progress, kind="removal", total=3)
    assert (output.folder / REPORT_NAME).exists()
    assert "the same command goes on" in notes.said[0]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    from rsprune.checkpoint import sha256

    with pytest.raises(RspruneError, match=r"none\.safetensors: cannot be read: No such file"):
        sha256(tmp_path / "none.safetensors")


def test_blocks_asks_for_its_folder_before_it_scores(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr("rsprune.depth.survey.survey", never)
    words = ["blocks", str(tiny("llama")), "--html", str(tmp_path / "none" / "scores.html")]
    assert run(words, monkeypatch) == 2


def test_a_dry_run_that_does_not_fit_says_so_by_its_code(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ["compress", str(tiny("llama")), str(tmp_path / "out"), "--dry-run", "--memory", "1MiB"]
    assert run([*words, "--method", "magnitude"], monkeypatch) == 3
