"""Benches are run by hand, so nothing else would tell that what they import has gone.

That is, at the top of their files: imports inside of functions are not tried.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHES = sorted((Path(__file__).parents[1] / "benches" / "python").glob("*.py"))


def test_there_are_benches() -> None:
    assert len(BENCHES) > 10


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_what_a_bench_imports_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up
    spec.loader.exec_module(module)
