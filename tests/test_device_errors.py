"""Devices that answer with EIO: the error names the file and the place, nothing half-written looks
whole, and the run goes on to the same bytes.

The calls fail in a process of its own, in which `device_errors.c` is preloaded.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_resume import config_of, contents

from rsprune import compress
from rsprune.errors import RspruneError
from rsprune.report import REPORT_NAME

SHIM = Path(__file__).with_name("device_errors.c")
NEVER = 1 << 40

CASES = {
    "first read": ("pread", "model", 0.0, r"model.*safetensors: read of the header length"),
    "middle read": ("pread", "model", 0.5, r"model.*safetensors: read of \d+ bytes at \d+"),
    "last read": ("pread", "model", 1.0, r"model.*safetensors: read of \d+ bytes at \d+"),
    "shard": ("pwrite", "out/model-00002", 0.5, r"model-00002.*: write of .* \d+ bytes at \d+"),
    "shard on disk": ("fsync", "out/model-00003", 0.0, r"model-00003.*: fsync"),
    "line": ("write", f"out/{REPORT_NAME}", 0.5, rf"{REPORT_NAME}: write of a \w+ line"),
    "line on disk": ("fsync", f"out/{REPORT_NAME}", 0.0, rf"{REPORT_NAME}: write of a layer line"),
    "index": ("pwrite", "out/model.safetensors.index", 0.0, r"index.json.*: write of the file"),
}
"""Call, file in the input or the output, how far the run is, and what the error says."""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux")
    library = tmp_path_factory.mktemp("shim") / "device_errors.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True)
    return library


def child(model: Path, documents: Path, folder: Path) -> None:
    """Runs all cases with the preloaded library; prints what became of them."""
    device: Any = ctypes.CDLL(None)
    device.fail.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long]
    device.calls.restype = ctypes.c_long
    config = config_of("sequential", documents)
    found = {}
    for name, (call, file, progress, _) in CASES.items():
        work = folder / name.replace(" ", "-")
        work.mkdir()
        out = work / "out"
        partial = f"{out}.partial"
        path = file.replace("out/", f"{partial}/") if "out/" in file else f"{model}/"
        device.fail(call.encode(), path.encode(), NEVER)
        whole = contents(compress(model, out, config).folder)
        count = device.calls()
        shutil.rmtree(out)
        device.fail(call.encode(), path.encode(), 1 + round(progress * (count - 1)))
        try:
            compress(model, out, config)
            message = "no error"
        except (RspruneError, OSError) as error:
            message = str(error)
        device.fail(b"", b"", NEVER)
        left = [p.name for p in work.rglob("*") if p.suffix == ".tmp" or p == out]
        again = contents(compress(model, out, config).folder)
        found[name] = {"calls": count, "message": message, "left": left, "same": again == whole}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def outcomes(
    shim: Path, tiny: Any, documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    paths = ", ".join(f"Path({str(path)!r})" for path in (tiny("llama"), documents, folder))
    code = f"from pathlib import Path; import test_device_errors as t; t.child({paths})"
    search = os.pathsep.join([str(SHIM.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": search, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_an_error_of_the_device_is_named_and_mended(outcomes: dict[str, Any], name: str) -> None:
    outcome = outcomes[name]
    assert outcome["calls"] > 0
    assert re.search(CASES[name][3], outcome["message"]), outcome["message"]
    assert "Input/output error" in outcome["message"]
    assert outcome["left"] == []
    assert outcome["same"]
