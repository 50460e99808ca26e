"""What the tests of hostile checkpoints share: the command line as a user sees it, and traps."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rsprune.cli import main

SIZES = ["--samples", "4", "--seq-len", "32", "--threads", "1"]
COMMANDS = ("plan", "compress", "eval", "inspect", "verify")


class CommandLine:
    """Runs rsprune in this process, all commands on one model."""

    def __init__(self, text: Path, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.text, self.capfd = str(text), capfd
        self.results = work / "results"

    def arguments(self, command: str, model: Path) -> list[str]:
        more: dict[str, list[str]] = {
            "plan": ["--calibration", self.text, *SIZES],
            "compress": [
                str(self.results / "out"),
                "--quiet",
                "--calibration",
                self.text,
                *SIZES,
            ],
            "eval": ["--text", self.text, "--seq-len", "32", "--windows", "1", "--quiet"],
        }
        return [command, str(model), *more.get(command, [])]

    def run(self, arguments: list[str]) -> tuple[int, str, str]:
        """The exit code, stdout and stderr, that of the libraries below Python too."""
        before = sys.argv
        sys.argv = ["rsprune", *arguments]
        self.capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as caught:
                main()
        finally:
            sys.argv = before
        out, err = self.capfd.readouterr()
        code = caught.value.code
        assert isinstance(code, int)
        return code, out, err

    def refusal(self, command: str, model: Path, *options: str) -> str:
        """The one line in which `command` refuses `model`, having written nothing."""
        code, out, err = self.run([*self.arguments(command, model), *options])
        said = out if command == "verify" else err
        assert code == (1 if command == "verify" else 2), (code, said)
        for word in ("Traceback", "panicked", "RSPRUNE_DEBUG"):
            assert word not in out + err
        wrong = "problem: " if command == "verify" else "error: "
        lines = [line for line in said.splitlines() if line.startswith(wrong)]
        assert lines, (out, err)
        assert command == "verify" or err.splitlines()[-1:] == lines
        assert not self.results.exists() or list(self.results.iterdir()) == []
        return "\n".join(lines)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config(**changes: Any) -> Callable[[Path], None]:
    """A damage: other values in config.json."""
    return lambda folder: edit_json(folder / "config.json", **changes)


def text_of(name: str, content: str | bytes) -> Callable[[Path], object]:
    """A damage: another content of a file."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


class Opens:
    """Pickled, it is a file that creates `path` when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")
