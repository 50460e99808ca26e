"""The same bits for any number of threads, the same result for any kernel, `fork` and Ctrl-C."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_cases import LEADING, METHODS, Case, run, statistics

from rsprune import _core

THREADS = (1, 2, 5)
ROW_BLOCK, GRAM_BLOCK, COLUMN_BLOCK = 98, 112, 128
"""How the core cuts its work; if it is cut otherwise, the shapes below may need to grow."""

HERE = Path(__file__).parent
FORK_SECONDS = 60
CTRL_C_SECONDS = 2.0


def case(corrected: bool = False) -> Case:
    return Case.random(2 * ROW_BLOCK + 15, 268, corrected=corrected)


def small_case(corrected: bool = False) -> Case:
    """For the methods that take hundreds of products; two blocks of each kind."""
    return Case.random(ROW_BLOCK + 15, COLUMN_BLOCK + 16, corrected=corrected)


def test_there_are_several_blocks_of_each_kind() -> None:
    m, n = case().weight.shape
    assert m > 2 * ROW_BLOCK
    assert n > 2 * GRAM_BLOCK
    assert n > 2 * COLUMN_BLOCK
    m, n = small_case().weight.shape
    assert m > ROW_BLOCK
    assert n > max(GRAM_BLOCK, COLUMN_BLOCK)


@pytest.mark.parametrize("corrected", [False, True])
def test_sums_have_the_same_bits_for_any_number_of_threads(corrected: bool) -> None:
    inputs = case(corrected).part(heldout=False)
    results = []
    for threads in THREADS:
        sums = statistics(*inputs, threads=threads)
        parts = [sums.gram(), sums.diagonal()]
        if corrected:
            parts += [sums.cross(), sums.drift()]
        results.append([part.tobytes() for part in parts])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("pattern", "scope"), [("2:4", "row"), ("50%", "row"), ("50%", "matrix")])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in LEADING])
def test_solvers_give_the_same_bits_for_any_number_of_threads(
    method: str, pattern: str, scope: str, corrected: bool
) -> None:
    check_threads(case(corrected), pattern, scope, method)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(
    ("pattern", "scope"), [("2:4", "row"), ("8:16", "row"), ("50%", "row"), ("50%", "matrix")]
)
@pytest.mark.parametrize(
    ("method", "options"), [*((m, {}) for m in LEADING), ("admm", {"slow": True})]
)
def test_leading_solvers_give_the_same_bits_for_any_number_of_threads(
    method: str, options: dict[str, Any], pattern: str, scope: str, corrected: bool
) -> None:
    check_threads(small_case(corrected), pattern, scope, method, **options)


def check_threads(case: Case, pattern: str, scope: str, method: str, **options: Any) -> None:
    operator = case.operator(pattern, scope)
    results = [run(method, operator, threads=threads, **options) for threads in THREADS]
    assert len({values.tobytes() for values, _ in results}) == 1
    assert results[0][1] == results[1][1] == results[2][1]


def errors() -> dict[str, list[float]]:
    """The errors of all methods on one problem, as this process computes them."""
    found = {}
    for method in METHODS:
        problem = small_case if method in LEADING else case
        certificate = run(method, problem(corrected=True).operator("2:4"))[1]
        found[method] = [certificate["error"], certificate["heldout_error"]]
    return found


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    """A process with the test folder and this package on its path; it says when it is ready."""
    path = os.pathsep.join([str(HERE), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("kernel", ["avx512", "avx2", "neon", "scalar"])
def test_kernels_agree(kernel: str) -> None:
    code = (
        "import json, test_determinism as t; from rsprune import _core;"
        "print(json.dumps([_core.kernel_name(), t.errors()]))"
    )
    process = python(code, RSPRUNE_KERNEL=kernel)
    out, err = process.communicate(timeout=120)
    if f"RSPRUNE_KERNEL={kernel}: this CPU has" in err:
        pytest.skip(err.strip().splitlines()[-1])
    assert process.returncode == 0, err
    name, found = json.loads(out)
    assert name == kernel
    for method, expected in errors().items():
        # Masks that follow from hundreds of products may differ in a few entries.
        tolerance = 0.01 if method in LEADING else 1e-3
        assert found[method] == pytest.approx(expected, rel=tolerance), method


def test_an_unknown_kernel_is_refused_with_those_that_there_are() -> None:
    process = python("from rsprune import _core; _core.kernel_name()", RSPRUNE_KERNEL="mmx")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "ValueError: RSPRUNE_KERNEL=mmx: this CPU has" in err
    assert "scalar" in err


def solve_in_child(queue: Any, operator: Any) -> None:
    queue.put(run("wanda", operator, threads=2)[0].tobytes())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_a_pool_of_its_own() -> None:
    operator = case().operator("2:4")
    expected = run("wanda", operator, threads=2)[0].tobytes()  # the parent's pool exists now
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=solve_in_child, args=(queue, operator))
    child.start()
    try:
        deadline = time.monotonic() + FORK_SECONDS
        while queue.empty() and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not queue.empty(), "the child hung or died"
        assert queue.get() == expected
        child.join(FORK_SECONDS)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert run("wanda", operator, threads=2)[0].tobytes() == expected  # and so has the parent


LONG_SOLVE = """
import signal
import reference_cases as r
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may ignore it
operator = r.Case.random({rows}, 1024, tokens=1100).operator("2:4")
print("ready", flush=True)
r.run("{method}", operator, threads=2, **{options})
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize(
    ("method", "options", "rows"),
    [("fista", {"iterations": 10_000_000}, 400), ("best", {}, 4000)],
)
def test_ctrl_c_ends_a_long_solve(method: str, options: dict[str, int], rows: int) -> None:
    process = python(LONG_SOLVE.format(method=method, options=options, rows=rows))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(1.0)  # into the iterations, which would go on for long
        assert process.poll() is None
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=30)[1]
        elapsed = time.monotonic() - sent
    finally:
        process.kill()
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert elapsed < CTRL_C_SECONDS


def test_default_threads_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSPRUNE_NUM_THREADS", "3")
    assert _core.default_threads() == 3
    monkeypatch.setenv("RSPRUNE_NUM_THREADS", "none")
    assert _core.default_threads() >= 1


def test_batches_change_sums_by_rounding_only() -> None:
    """A batch is summed in float32, batches among each other in float64."""
    x = case().part(heldout=False)[0]
    one, many = statistics(x, batch=len(x)).gram(), statistics(x, batch=64).gram()
    scale = np.sqrt(np.outer(np.diag(many), np.diag(many)))
    assert np.abs((one - many) / scale).max() < 5e-6
