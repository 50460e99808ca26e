"""Disks that fill up at some call of some work: every kind of work, seeded instants of each.

Room is asked for by writing, copying, and `fallocate` (hidden states, sums, solvers' matrices).
From the chosen call on there is none: an error that names the file, nothing that looks whole, and
the same command goes on to the same bytes once there is room again.
"""

import errno
import json
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gguf_models import build as build_gguf
from preloaded import Device, attempt, run_preloaded
from replaced_models import OPTIONS as REPLACED
from test_depth_run import config_of as depth_config
from test_resume import OPTIONS, VOLATILE

from rsprune import Config, compress, perplexity, plan
from rsprune.export import export_dense
from rsprune.flexi import train as training
from rsprune.gguf_export import export_gguf
from rsprune.memory_plan import SPILLS
from rsprune.report import REPORT_NAME

CALLS = "write pwrite fallocate"
INSTANTS = 3
SPILLED: dict[str, dict[str, Any]] = {
    "fista-plus": {"method": "fista-plus", "max_rounds": 1, "polish_steps": 1},
    "tuned": {"method": "best", "budget": 1, "tune_block": True, "tune_steps": 4},
    "allocated": {"method": "sparsegpt", "pattern": "70%", "allocate": True},
    "codes": {"method": "pbs2p-exact", "bits": 1.9, "format": "packed"},
}
LAYERS = {
    "pip": {"method": "pip"},
    "folded": {"method": "bi", "fold": True},
    "greedy": {"method": "perplexity-greedy"},
}
OTHERS = ["flexigpt", "training", "dense", "gguf", "losses"]
WORKS = [*SPILLED, *LAYERS, *OTHERS]


def works(model: Path, documents: Path, folder: Path) -> dict[str, Callable[[Path], object]]:
    """What writes `out`, by name."""
    common = {"calibration": str(documents), **OPTIONS}
    found: dict[str, Callable[[Path], object]] = {}
    for name, options in SPILLED.items():
        config = Config(**{**common, **options})
        found[name] = lambda out, c=config: compress(model, out, c)
    for name, options in LAYERS.items():
        config = depth_config(documents, **options)
        found[name] = lambda out, c=config: compress(model, out, c)
    replaced = {**REPLACED, "calibration": str(documents), "remove": "1"}
    flexi = Config.create(**replaced, recover=True)
    deep, packed = folder / "replaced", folder / "packed"
    compress(model, deep, Config.create(**replaced))
    pack = Config.create(method="magnitude", format="packed", threads=1)
    compress(model, packed, pack)
    compress(build_gguf(folder / "wide"), folder / "wide-packed", pack)
    steps = training.Training(steps=4, seq_len=32, threads=1)
    found["flexigpt"] = lambda out: compress(model, out, flexi)
    found["training"] = lambda out: training.train(deep, out, documents, steps)
    found["dense"] = lambda out: export_dense(packed, out)
    found["gguf"] = lambda out: export_gguf(folder / "wide-packed", out, "F16")
    found["losses"] = lambda out: perplexity(model, documents, seq_len=64, resume=out, threads=1)
    return found


def bytes_of(out: Path) -> Any:
    """All that lies there, but for what depends on the clock."""
    if out.is_file():
        return out.read_bytes()
    files: dict[str, Any] = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file()}
    files = {name: path.read_bytes() for name, path in sorted(files.items())}
    report = files.pop(REPORT_NAME, b"").splitlines()
    return files, [json.loads(line, object_hook=without_clock) for line in report]


def without_clock(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in VOLATILE}


def child(model: Path, documents: Path, folder: Path) -> None:
    """Runs all works with the preloaded library; prints what became of them."""
    device, found = Device(errno.ENOSPC), {}
    plan.fit = lambda memory, limit: (limit, SPILLS)
    training.SAVED_EVERY = 2
    for name, work in works(model, documents, folder).items():
        place = folder / name
        place.mkdir()
        out = place / ("out.gguf" if name == "gguf" else "out")
        device.count(CALLS, f"{place}/")
        work(out)
        count, whole = device.calls(), bytes_of(out)
        instants = sorted(random.Random(name).sample(range(1, count + 1), min(INSTANTS, count)))
        outcomes = []
        for instant in instants:
            shutil.rmtree(out) if out.is_dir() else out.unlink()
            device.fail(CALLS, f"{place}/", instant)
            message = attempt(partial(work, out))
            device.mend()
            left = [p.name for p in place.rglob("*") if p.suffix == ".tmp"]
            exists = out.exists() and name != "losses"  # which is a journal, and grows
            again = attempt(partial(work, out))
            same = out.exists() and bytes_of(out) == whole
            outcomes.append([instant, message, left, exists, again, same])
        found[name] = {"calls": count, "outcomes": outcomes}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def outcomes(
    tiny: Any, documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("works")
    return run_preloaded("test_full_device", [tiny("llama"), documents, folder], folder)


@pytest.mark.parametrize("name", WORKS)
def test_a_disk_without_room_ends_the_work_and_harms_nothing(
    outcomes: dict[str, Any], name: str
) -> None:
    assert outcomes[name]["calls"] >= 1
    for instant, message, left, exists, again, same in outcomes[name]["outcomes"]:
        where = f"{name}, call {instant} of {outcomes[name]['calls']}"
        assert re.search(rf"{name}/out.*No space left on device", message), (where, message)
        assert not exists, where
        assert left == [], where
        assert again == "no error", (where, again)
        assert same, where
