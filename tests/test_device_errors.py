"""Devices that answer with EIO: the error names the file and the place, nothing half-written looks
whole, and the run goes on to the same bytes.
"""

import errno
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from preloaded import Device, attempt, run_preloaded
from test_resume import config_of, contents

from rsprune import compress
from rsprune.report import REPORT_NAME

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


def child(model: Path, documents: Path, folder: Path) -> None:
    """Runs all cases with the preloaded library; prints what became of them."""
    device = Device(errno.EIO)
    config = config_of("sequential", documents)
    found = {}
    for name, (call, file, progress, _) in CASES.items():
        work = folder / name.replace(" ", "-")
        work.mkdir()
        out = work / "out"
        unfinished = f"{out}.partial"
        path = file.replace("out/", f"{unfinished}/") if "out/" in file else f"{model}/"
        device.count(call, path)
        whole = contents(compress(model, out, config).folder)
        count = device.calls()
        shutil.rmtree(out)
        device.fail(call, path, 1 + round(progress * (count - 1)))
        message = attempt(partial(compress, model, out, config))
        device.mend()
        left = [p.name for p in work.rglob("*") if p.suffix == ".tmp" or p == out]
        again = contents(compress(model, out, config).folder)
        found[name] = {"calls": count, "message": message, "left": left, "same": again == whole}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def outcomes(
    tiny: Any, documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    return run_preloaded("test_device_errors", [tiny("llama"), documents, folder], folder)


@pytest.mark.parametrize("name", CASES)
def test_an_error_of_the_device_is_named_and_mended(outcomes: dict[str, Any], name: str) -> None:
    outcome = outcomes[name]
    assert outcome["calls"] > 0
    assert re.search(CASES[name][3], outcome["message"]), outcome["message"]
    assert "Input/output error" in outcome["message"]
    assert outcome["left"] == []
    assert outcome["same"]
