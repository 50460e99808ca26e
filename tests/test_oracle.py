"""The Rust solvers against their independent NumPy twins, in float64 and from the papers' forms.

Tolerances: the core works in float32. A score that is nearly tied may fall on the other side, and
in SparseGPT and FISTA what follows then differs; so masks agree nearly everywhere, and errors,
which such a choice hardly moves, agree to a few times 1e-3.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from reference_cases import FISTA, METHODS, Case, operators_of_layer, run

from rsprune import reference
from rsprune.reference import Pattern

PATTERNS = [
    ("2:4", "row"), ("4:8", "row"), ("2:8", "row"), ("8:16", "row"), ("50%", "row"),
    ("50%", "matrix"),
]  # fmt: skip
SHAPES = [(75, 132), (101, 260)]
"""Neither rows nor columns are whole tiles (14 x 32), row blocks (98) or column blocks (128)."""
MARGIN = 1.02
"""What the core multiplies its estimate of the largest eigenvalue with."""

patterns = pytest.mark.parametrize(("text", "scope"), PATTERNS)


def fitting(m: int, n: int, text: str) -> tuple[int, int]:
    """The shape, its columns rounded up to whole groups."""
    of = int(text.split(":")[1]) if ":" in text else 1
    return m, -(-n // of) * of


def test_shapes_are_ragged() -> None:
    for m, n in SHAPES:
        assert all(m % k for k in (2, 14, 32, 98, 128))
        assert all(n % k for k in (14, 32, 98, 128))


@pytest.mark.parametrize("corrected", [False, True])
def test_statistics_are_the_sums(corrected: bool) -> None:
    case = Case.random(3, 132, corrected=corrected)
    sums, twin = case.sums[0], case.twin
    scale = np.sqrt(np.outer(np.diag(twin.gram), np.diag(twin.gram)))
    assert sums.tokens == twin.tokens == case.split
    assert np.abs((sums.gram() - twin.gram) / scale).max() < 2e-6
    np.testing.assert_array_equal(sums.gram(), sums.gram().T)
    np.testing.assert_array_equal(sums.diagonal(), np.diag(sums.gram()))
    if corrected:
        moved = np.sqrt(np.diag(twin.drift))
        across = np.outer(moved, np.sqrt(np.diag(twin.gram)))
        assert np.abs((sums.cross() - twin.cross) / across).max() < 2e-6
        assert np.abs((sums.drift() - twin.drift) / np.outer(moved, moved)).max() < 2e-6
    else:
        assert sums.cross() is None
        assert sums.drift() is None


@patterns
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_magnitude_and_wanda_keep_the_same_weights(text: str, scope: str, dtype: str) -> None:
    for m, n in SHAPES:
        case = Case.random(*fitting(m, n, text), dtype=dtype)
        pattern = Pattern(text, scope)
        operator = case.operator(text, scope)
        expected = reference.magnitude(case.values, pattern)
        np.testing.assert_array_equal(
            reference.widen(run("magnitude", operator)[0], dtype), expected
        )
        expected = reference.wanda(case.values, pattern, case.twin)
        np.testing.assert_array_equal(reference.widen(run("wanda", operator)[0], dtype), expected)


@patterns
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_sparsegpt_makes_up_for_its_mask(
    m: int, n: int, text: str, scope: str, corrected: bool
) -> None:
    case = Case.random(*fitting(m, n, text), corrected=corrected)
    found, certificate = run("sparsegpt", case.operator(text, scope))
    arguments = (case.values, Pattern(text, scope), case.twin)
    twin = reference.sparsegpt(*arguments, damping=0.01, mask=found == 0)
    assert np.abs(found - twin).max() < 1e-3 * np.abs(twin).max()
    assert certificate["error"] == pytest.approx(case.error(twin), rel=1e-3)


@patterns
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_sparsegpt(m: int, n: int, text: str, scope: str, corrected: bool) -> None:
    case = Case.random(*fitting(m, n, text), corrected=corrected)
    found, certificate = run("sparsegpt", case.operator(text, scope))
    twin = reference.sparsegpt(case.values, Pattern(text, scope), case.twin, damping=0.01)
    same = (found == 0) == (twin == 0)
    assert same.mean() >= 0.995
    assert certificate["error"] == pytest.approx(case.error(twin), rel=1e-3)
    rows = same.all(axis=1)  # a flipped entry moves what comes later in its row
    assert rows.mean() > 0.9
    assert np.abs(found - twin)[rows].max() < 1e-3 * np.abs(twin).max()


@patterns
@pytest.mark.parametrize("warm_start", ["wanda", "sparsegpt"])
def test_fista(text: str, scope: str, warm_start: str) -> None:
    case = Case.random(*fitting(101, 260, text))
    options = FISTA | {"warm_start": warm_start}
    check_fista(case, text, scope, options)


@patterns
def test_fista_with_corrected_inputs(text: str, scope: str) -> None:
    case = Case.random(*fitting(75, 132, text), corrected=True)
    check_fista(case, text, scope, FISTA)


def check_fista(case: Case, text: str, scope: str, options: dict[str, object]) -> None:
    """With the core's step the same rounds; with the step of the exact eigenvalue, near."""
    found, certificate = run("fista", case.operator(text, scope), **options)
    largest = np.linalg.eigvalsh(case.twin.gram)[-1] / case.twin.mean_square
    arguments = (case.values, Pattern(text, scope), case.twin)
    twin = reference.fista(*arguments, lipschitz=MARGIN * largest, **options)
    assert certificate["rounds"] == twin.rounds
    assert certificate["iterations"] == twin.rounds * 20
    assert certificate["lambda"] == pytest.approx(twin.lambda_, rel=1e-9)
    assert certificate["error"] == pytest.approx(twin.error, rel=2e-3)
    assert ((found == 0) == (twin.values == 0)).mean() >= 0.995
    # Another step takes other turns in the bisection of lambda.
    independent = reference.fista(*arguments, **options)
    assert certificate["error"] == pytest.approx(independent.error, rel=0.06)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_the_certificate_is_the_error_of_what_is_stored(
    method: str, corrected: bool, dtype: str
) -> None:
    case = Case.random(75, 132, dtype=dtype, corrected=corrected)
    found, certificate = run(method, case.operator("2:4"))
    values = reference.widen(found, dtype)
    assert certificate["error"] == pytest.approx(case.error(values), rel=1e-4)
    assert certificate["heldout_error"] == pytest.approx(case.error(values, heldout=True), rel=1e-4)
    assert certificate["sparsity"] == (values == 0).mean()
    assert certificate["tokens"] == case.split


@pytest.mark.parametrize("corrected", [False, True])
def test_both_forms_of_the_error_agree(corrected: bool) -> None:
    case = Case.random(20, 44, corrected=corrected)
    values = reference.wanda(case.values, Pattern("2:4"), case.twin)
    assert reference.quadratic_error(values, case.values, case.twin) == pytest.approx(
        case.error(values), rel=1e-9
    )


@pytest.mark.slow
@pytest.mark.shared
def test_real_layer(smollm2: Path, shared_dir: Path) -> None:
    """Layer 3 of SmolLM2-135M with 2,048 tokens; its Grams are far worse conditioned."""
    seen = set()
    where = {"layer": 3, "pattern": "2:4", "rows": 200}
    for linear, operator in operators_of_layer(smollm2, shared_dir, **where):
        seen.add(linear)
        twin, pattern = reference.Statistics.of(operator.calibration), Pattern("2:4", "matrix")
        weight = reference.widen(operator.weight, operator.dtype)

        def error(values: np.ndarray) -> float:
            return reference.quadratic_error(values, weight, twin)

        found, certificate = run("wanda", operator)
        expected = reference.wanda(weight, pattern, twin)
        assert (reference.widen(found, "BF16") != expected).mean() < 1e-5  # ties of bf16 weights
        assert certificate["error"] == pytest.approx(error(expected), rel=1e-3)
        certificate = run("sparsegpt", operator)[1]
        expected = reference.sparsegpt(weight, pattern, twin, damping=0.01)
        assert certificate["error"] == pytest.approx(error(expected), rel=0.01)
        certificate = run("fista", operator)[1]
        largest = np.linalg.eigvalsh(twin.gram)[-1] / twin.mean_square
        point = reference.fista(weight, pattern, twin, lipschitz=MARGIN * largest)
        assert certificate["error"] == pytest.approx(point.error, rel=0.03)
    assert seen == {"q_proj", "o_proj", "up_proj", "down_proj"}
