"""Packed folders in releases of transformers beside the installed one: `make compat`.

Each release is installed from PyPI into a clean environment with what it depends on; torch and the
rest are seen through a path file behind it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from packed_models import binarized, pair_of

pytestmark = pytest.mark.compat

RELEASES = {"old": "4.57.6", "middle": "5.17.0"}
CHECK = Path(__file__).with_name("compat_check.py")


@pytest.fixture(scope="module")
def folders(
    tiny: Callable[..., Path], documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Path, Path]]:
    """Packed and dense: tied embeddings with grouped heads, and signs."""
    here = tmp_path_factory.mktemp("packed")
    signs = binarized(tiny("llama"), here / "model", "3:4", shutil.copyfile)
    made = [(tiny("llama_tied"), "2:4"), (signs, "3:4"), (tiny("opt"), "50%")]
    pairs = [
        pair_of(model, here / str(number), documents, pattern, "magnitude")
        for number, (model, pattern) in enumerate(made)
    ]
    return [(pair.packed, pair.dense) for pair in pairs]


def environment(folder: Path, version: str) -> Path:
    """The interpreter of a new environment with that transformers."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", f"transformers=={version}"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or "pip failed").splitlines()[-1]
        pytest.skip(f"transformers {version} cannot be installed: {last}")
    (site,) = folder.glob("lib/python*/site-packages")
    shared = [sysconfig.get_paths()["purelib"], str(Path(__file__).parents[1] / "python")]
    (site / "zz-behind.pth").write_text("\n".join(shared) + "\n")
    return python


@pytest.mark.parametrize("release", RELEASES)
def test_packed_folders_load_in(
    release: str, folders: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    version = RELEASES[release]
    python = environment(tmp_path / release, version)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for packed, dense in folders:
        done = subprocess.run(
            [python, CHECK, packed, dense], env=variables, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"transformers {version}: packed folders load"
