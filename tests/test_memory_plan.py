"""What the plan says of memory: parts, stages, and what lies in files, with the same bits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_cases import LEADING, METHODS, Case, bits_equal, run, statistics
from tiny_models import KINDS, build

from rsprune import _core, methods
from rsprune.config import Config
from rsprune.driver import make_plan
from rsprune.errors import DoesNotFitError
from rsprune.memory_plan import HELD_IN, SPILLS, STAGES, fit, stage_peaks
from rsprune.methods import Operator

PARTS = {
    "python, torch and the model's structure": 100, "decoder layer (as stored)": 10, "Grams": 7,
    "solver": 5, "solver's matrices": 20, "activations of one window": 9, "hidden states": 50,
    "budget": 0, "tuning": 0,
}  # fmt: skip


def spilling(operator: Operator, folder: Path) -> Operator:
    return Operator(**{**vars(operator), "spill": folder})


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("pattern", "scope"), [("2:4", "row"), ("50%", "row"), ("50%", "matrix")])
@pytest.mark.parametrize("method", [*METHODS, "fista_plus with its floor"])
def test_what_lies_in_files_has_the_bits_that_it_has_in_memory(
    tmp_path: Path, method: str, pattern: str, scope: str, corrected: bool
) -> None:
    options = {"floor": "wanda"} if " " in method else {}
    name = method.partition(" ")[0]
    shape = (113, 144) if name in LEADING else (211, 268)
    operator = Case.random(*shape, corrected=corrected).operator(pattern, scope)
    expected, certificate = run(name, operator, **options)
    found, judged = run(name, spilling(operator, tmp_path), threads=2, **options)
    assert bits_equal(found, expected)
    assert judged == certificate
    assert list(tmp_path.iterdir()) == []


def test_a_solver_without_its_folder_names_it(tmp_path: Path) -> None:
    operator = Case.random(4, 8).operator("2:4")
    with pytest.raises(OSError, match=r"gone.*creation"):
        run("admm", spilling(operator, tmp_path / "gone"))


CHILD = """
import sys; from pathlib import Path
from test_memory_plan import wide
from rsprune import _core
from rsprune.memory import PeakWatch, rss_anon
from rsprune.methods import Operator
operator = wide(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
with PeakWatch() as watch:
    before = rss_anon()
    _core.fista(operator, warm_start="wanda", iterations=1, xi=0.3, patience=1, lambda_start=0.01,
                damping=0.01, threads=1)
print(watch.peak - before)
"""
ROWS, COLUMNS = 16384, 256


def wide(spill: Path | None) -> Operator:
    """Many rows: a matrix takes 16 MiB, a square a quarter of one."""
    rng = np.random.default_rng(0)
    sums = statistics(rng.standard_normal((512, COLUMNS)).astype(np.float32))
    weight = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    return Operator(weight, "F32", _core.Pattern("2:4"), sums, None, spill)


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_a_solver_holds_what_the_plan_says(tmp_path: Path) -> None:
    def grown(*arguments: str) -> int:
        command = [sys.executable, "-c", CHILD, *arguments]
        path = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path])}
        done = subprocess.run(command, env=path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    matrix = 4 * ROWS * COLUMNS
    workspace = methods.get("fista").workspace(COLUMNS)
    assert 3 * matrix < grown() < (workspace.matrices + 2) * matrix  # with the result
    assert grown(str(tmp_path)) < 1.5 * matrix  # the result, a square and a block of rows


def test_a_stage_holds_its_parts() -> None:
    assert list(stage_peaks({**PARTS, "budget": 1, "tuning": 1})) == list(STAGES)
    peaks = stage_peaks({**PARTS, "budget": 0, "tuning": 0})
    assert set(STAGES) - set(peaks) == {"allocate", "tune"}
    assert peaks["read and check"] == 100
    assert peaks["calibrate"] == 100 + 10 + 7 + 9 + 50
    assert peaks["solve"] == 100 + 10 + 7 + 5 + 20 + 50
    assert stage_peaks(PARTS, SPILLS)["solve"] == 100 + 10 + 5
    assert set(SPILLS) <= set(HELD_IN)
    assert all(set(stages) <= set(STAGES) for stages in HELD_IN.values())


def test_files_are_used_one_part_after_another() -> None:
    assert fit(PARTS, 192) == (192, ())
    assert fit(PARTS, 191) == (142, SPILLS[:1])
    assert fit(PARTS, 141) == (135, SPILLS[:2])
    assert fit(PARTS, 134) == (119, SPILLS)
    with pytest.raises(DoesNotFitError) as caught:
        fit(PARTS, 118)
    assert caught.value.smallest == 119


SOLVERS = [name for name in methods.names() if not methods.removes_layers(name)]


@pytest.mark.parametrize("method", SOLVERS)
def test_every_solver_says_what_it_holds(tiny_llama: Path, method: str) -> None:
    options: dict[str, Any] = {"samples": 2, "seq_len": 16, "method": method}
    options |= {"pattern": "6:8"} if method == "pbs2p" else {}
    options |= {"bits": 2} if method == "pbs2p-exact" else {}
    parts = dict(make_plan(tiny_llama, Config(**options)).memory)
    assert (parts["budget"] > 0) == methods.differ(Config(**options))
    if method in methods.CODED:
        assert min(parts["solver"], parts["solver's matrices"]) > 0
        return  # codes are not polished
    polished = dict(make_plan(tiny_llama, Config(**options, refit=True)).memory)
    assert parts["solver's matrices"] <= polished["solver's matrices"]
    assert 0 < parts["solver"] <= polished["solver"]


def test_wide_operators_are_solved_without_an_inverse() -> None:
    narrow, wide = (methods.get("admm").workspace(columns) for columns in (8192, 8193))
    assert narrow.resident == wide.resident + 2


BOUNDED = """
import sys, json, pathlib, rsprune
options = json.loads(sys.argv[4])
config = rsprune.Config.create(calibration=sys.argv[3], threads=2, **options)
try:
    summary = rsprune.compress(sys.argv[1], sys.argv[2], config).summary
    print(json.dumps([summary["peak_rss_anon"], summary["import_rss_anon"]]))
except rsprune.RspruneError as error:
    print(json.dumps([error.smallest, None]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda"},
        {"method": "sparsegpt", "format": "packed"},
        {"method": "best", "tune_block": True, "tune_steps": 4},
        {"method": "pip", "remove": "1", "protect": (0, 0), "texts": 6},
    ],
    ids=lambda options: options["method"],
)
def test_a_run_stays_below_the_smallest_bound_that_its_plan_names(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From the first read to the last write, as `/proc` says; it needs far more than imports."""
    wide = {"hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 512}
    monkeypatch.setitem(KINDS, "wide", ("Llama", wide))
    dense, text = build("wide", tmp_path / "wide"), tmp_path / "text.txt"
    text.write_text("a few words and no more, then some other words\n" * 1000)
    given = {"samples": 16, "seq_len": 256, **options}

    def bounded(memory: int) -> list[int]:
        words = map(str, (dense, tmp_path / "out", text, json.dumps({**given, "memory": memory})))
        command = [sys.executable, "-c", BOUNDED, *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        found: list[int] = json.loads(done.stdout.splitlines()[-1])
        return found

    smallest, _ = bounded(1)
    peak, imports = bounded(smallest + 2**23)  # the imports of two processes differ a little
    assert imports + 2**24 < peak < smallest + 2**23
