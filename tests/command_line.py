"""Running the command line, in this process and in another one."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rsprune import cli


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """`main` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["rsprune", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Puts a module of stand-ins in the place of one that needs torch."""
    module = ModuleType(name)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(cli.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source}
    command = [sys.executable, "-m", "rsprune", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
