"""What holds for every solver on any input, and what is refused with which words."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference_cases import LEADING, METHODS, Case, bits_equal, run, statistics

from rsprune import _core, reference

GUARDED = {"fista_plus", "best", "polish"}
methods = pytest.mark.parametrize("method", METHODS)
quick = settings(max_examples=25, deadline=None)
cases = st.builds(
    Case.random,
    m=st.integers(1, 12),
    n=st.sampled_from([16, 32, 48]),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
    corrected=st.booleans(),
)
some_pattern = st.sampled_from(["2:4", "1:4", "4:8", "8:16", "0%", "37%", "50%", "0.9"])
some_scope = st.sampled_from(["row", "matrix"])


@quick
@given(cases, some_pattern, some_scope, st.sampled_from(sorted(METHODS)))
def test_the_pattern_holds_in_the_type_of_the_input(
    case: Case, pattern: str, scope: str, method: str
) -> None:
    before = case.weight.copy()
    found, certificate = run(method, case.operator(pattern, scope))
    values = reference.widen(found, case.dtype)
    assert bits_equal(case.weight, before)
    assert (found.shape, found.dtype) == (case.weight.shape, case.weight.dtype)
    assert reference.Pattern(pattern, scope).holds(values)
    assert _core.Pattern(pattern, scope).holds(found, case.dtype)
    assert np.isfinite(values).all()
    assert certificate["sparsity"] == (values == 0).mean()


@quick
@given(st.floats(0.0, 0.999), st.sampled_from([160, 300, 576]), some_scope)
@example(0.33, 576, "row").via("blocks that round one by one leave a zero too few")
@example(0.7 - 0.12, 576, "matrix").via("a budget over layers asks for such shares")
def test_blocks_of_columns_have_the_ratio_together(sparsity: float, n: int, scope: str) -> None:
    case, text = Case.random(6, n), repr(sparsity)
    assert (case.values != 0).all()
    zeros = run("sparsegpt", case.operator(text, scope))[0] == 0
    units = zeros.reshape(1, -1) if scope == "matrix" else zeros
    expected = reference.Pattern(text, scope).zeros(units.shape[1])
    assert (units.sum(axis=1) == expected).all()


@quick
@given(cases, some_pattern, some_scope, st.sampled_from(["magnitude", "wanda"]))
def test_kept_weights_are_unchanged(case: Case, pattern: str, scope: str, method: str) -> None:
    found = run(method, case.operator(pattern, scope))[0]
    kept = reference.widen(found, case.dtype) != 0
    assert bits_equal(found[kept], case.weight[kept])


@quick
@given(cases, some_pattern, some_scope, st.sampled_from(["wanda", "sparsegpt"]))
def test_fista_is_no_worse_than_its_start(case: Case, pattern: str, scope: str, start: str) -> None:
    """In float32: the best point is kept before it is rounded to a half type."""
    case = dataclasses.replace(case, weight=case.values.astype(np.float32), dtype="F32")
    operator = case.operator(pattern, scope)
    error = run("fista", operator, warm_start=start)[1]["error"]
    assert error <= run(start, operator)[1]["error"]


@quick
@given(cases, st.sampled_from(sorted(METHODS)))
def test_nothing_to_prune_changes_nothing(case: Case, method: str) -> None:
    if case.dense is None:
        for pattern in ("0%", "4:4", "16:16"):
            found, certificate = run(method, case.operator(pattern))
            if method in LEADING and case.dtype == "F32":
                np.testing.assert_array_max_ulp(found, case.weight, maxulp=1)
                assert certificate["error"] < 1e-12
            else:
                assert bits_equal(found, case.weight)
                assert certificate["error"] == 0


@methods
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_half_type_is_the_float32_result_rounded_once(method: str, dtype: str) -> None:
    half = Case.random(30, 48, dtype=dtype)
    single = dataclasses.replace(half, weight=half.values.astype(np.float32), dtype="F32")
    expected = reference.narrow(run(method, single.operator("2:4"))[0], dtype)
    found = run(method, half.operator("2:4"))[0]
    values = reference.widen(found, dtype)
    if method not in GUARDED:  # these judge what is stored, and may choose another candidate
        assert bits_equal(found, expected)
    assert bits_equal(reference.narrow(values, dtype), found)


@methods
def test_dead_channels(method: str) -> None:
    case = Case.random(20, 48)
    case.x[:, [3, 17, 18, 19, 47]] = 0
    found, certificate = run(method, case.operator("2:4"))
    assert certificate["dead_channels"] == 5
    assert np.isfinite(found).all()
    assert certificate["error"] == pytest.approx(case.error(found), rel=1e-4)


@methods
@pytest.mark.parametrize("what", ["x", "weight"])
def test_nothing_but_zeros(method: str, what: str) -> None:
    case = Case.random(20, 48)
    getattr(case, what)[:] = 0
    found, certificate = run(method, case.operator("2:4"))
    assert np.isfinite(found).all()
    assert certificate["error"] == 0
    assert certificate["dead_channels"] == (48 if what == "x" else 0)
    assert certificate["sparsity"] == (0.5 if what == "x" else 1)


@methods
@pytest.mark.parametrize(("m", "n"), [(1, 48), (20, 4), (1, 4), (5, 52)])
def test_the_smallest_shapes(method: str, m: int, n: int) -> None:
    case = Case.random(m, n, tokens=20)
    found, certificate = run(method, case.operator("2:4"))
    empty = m * n // 2 - (found != 0).sum()  # places that a soft threshold leaves without need
    assert 0 <= empty <= (m * n / 8 if method in ("fista", "fista_plus", "best") else 0)
    assert certificate["error"] == pytest.approx(case.error(found), rel=1e-4, abs=1e-8)


@methods
@pytest.mark.parametrize(("m", "n", "zeros"), [(3, 7, 4), (2, 1, 1), (1, 2, 1), (4, 29, 15)])
def test_ratios_of_odd_widths(method: str, m: int, n: int, zeros: int) -> None:
    case = Case.random(m, n, tokens=60)
    found, certificate = run(method, case.operator("50%"))
    assert ((found == 0).sum(axis=1) >= zeros).all()
    assert certificate["error"] == pytest.approx(case.error(found), rel=1e-4)


@methods
@pytest.mark.parametrize("pattern", ["2:4", "8:16", "50%"])
@pytest.mark.parametrize("corrected", [False, True])
def test_singular_grams(method: str, pattern: str, corrected: bool) -> None:
    """Channels that are twins, doubles or negatives of others; fewer tokens than channels."""
    twins = Case.random(20, 48, corrected=corrected)
    for inputs in [twins.x] + [twins.dense] * corrected:
        inputs[:, 1], inputs[:, 3], inputs[:, 40] = inputs[:, 0], 2 * inputs[:, 2], -inputs[:, 5]
    few = Case.random(20, 48, corrected=corrected, tokens=10)
    for case in (twins, few):
        assert np.linalg.eigvalsh(case.scaled.statistics.gram)[0] < 1e-9
        found, certificate = run(method, case.operator(pattern))
        assert np.isfinite(found).all()
        assert reference.Pattern(pattern).holds(found)
        assert 0 < certificate["error"] < 1
        assert certificate["error"] == pytest.approx(case.error(found), rel=1e-4, abs=1e-8)


@methods
@pytest.mark.parametrize(("pattern", "n", "of"), [("2:4", 6, 4), ("4:8", 12, 8), ("8:16", 24, 16)])
def test_patterns_that_do_not_divide_are_named(method: str, pattern: str, n: int, of: int) -> None:
    operator = Case.random(4, n).operator("50%")
    operator = dataclasses.replace(operator, pattern=_core.Pattern(pattern))
    message = f"pattern {pattern} needs input columns divisible by {of}, found {n}"
    with pytest.raises(ValueError, match=message):
        run(method, operator)


def test_singular_grams_need_damping() -> None:
    operator = Case.random(20, 96, tokens=30).operator("2:4")
    certificate = run("sparsegpt", operator)[1]
    assert 0 < certificate["error"] < run("magnitude", operator)[1]["error"]
    with pytest.raises(ValueError, match=r"\(96 x 96\).*pivot \d+ with damping 0: use more cal"):
        run("sparsegpt", operator, damping=0.0)
    case = Case.random(20, 96)
    case.x[:, 41] = 0
    with pytest.raises(ValueError, match="not positive definite at pivot 41 with damping 0"):
        run("sparsegpt", case.operator("2:4"), damping=0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite(bad: float) -> None:
    x, spoiled = np.ones((2, 10, 8), np.float32)
    spoiled[3, 5] = bad
    sums = _core.Statistics(8, corrected=True)
    with pytest.raises(ValueError, match=r"^activations: non-finite value at flat index 29$"):
        sums.add(spoiled, x)
    with pytest.raises(ValueError, match=r"^dense activations: .* flat index 29$"):
        sums.add(x, spoiled)
    assert sums.tokens == 0
    assert not sums.gram().any()


def test_activations_of_the_wrong_kind() -> None:
    sums, x = _core.Statistics(8), np.ones((10, 8), np.float32)
    with pytest.raises(ValueError, match="x: expected 8 columns, found 7"):
        sums.add(x[:, :7].copy())
    with pytest.raises(ValueError, match="C-contiguous"):
        sums.add(np.ones((10, 16), np.float32)[:, ::2])
    with pytest.raises(ValueError, match="dense inputs go with corrected statistics only"):
        sums.add(x, x)
    corrected = _core.Statistics(8, corrected=True)
    with pytest.raises(ValueError, match="dense inputs go with corrected statistics only"):
        corrected.add(x)
    with pytest.raises(ValueError, match=r"dense: expected \[10, 8\], found \[9, 8\]"):
        corrected.add(x, x[:9])
    for wrong in (x.astype(np.float64), x[0]):
        with pytest.raises(TypeError, match=r"x: expected a float32 array \[tokens, 8\]"):
            sums.add(wrong)


@pytest.mark.parametrize(
    ("dtype", "weight", "kind", "message"),
    [
        ("F32", np.ones((2, 8)), TypeError, r"weight: F32 needs a 2-D C-contiguous float32"),
        ("F32", np.ones(8, np.float32), TypeError, "weight: F32 needs a 2-D"),
        ("BF16", np.ones((2, 8), np.float32), TypeError, r"BF16 needs .* uint16 \(bit patterns\)"),
        ("F16", np.ones((2, 8), np.float16), TypeError, r"F16 needs .* uint16 \(bit patterns\)"),
        ("I8", np.ones((2, 8), np.int8), ValueError, "dtype I8: weights must be stored as F32, B"),
        ("F32", np.ones((2, 16), np.float32)[:, ::2], ValueError, "C-contiguous"),
        ("F32", np.ones((2, 6), np.float32), ValueError, "2:4 needs input columns divisible by 4"),
        ("F32", np.ones((3, 12), np.float32), ValueError, "expected statistics of 12 channels"),
    ],
)
def test_weights_of_the_wrong_kind(
    dtype: str, weight: np.ndarray, kind: type[Exception], message: str
) -> None:
    operator = dataclasses.replace(Case.random(2, 8).operator("2:4"), weight=weight, dtype=dtype)
    for method in METHODS:
        with pytest.raises(kind, match=message):
            run(method, operator)


def test_options_of_the_wrong_kind() -> None:
    operator = Case.random(2, 8).operator("2:4")
    with pytest.raises(ValueError, match='warm_start "x": expected "wanda" or "sparsegpt"'):
        run("fista", operator, warm_start="x")
    with pytest.raises(ValueError, match='scope "block": expected "row" or "matrix"'):
        _core.Pattern("50%", "block")
    for bad in ("2:5", "0:4", "5:4", "100%", "-1", ""):
        with pytest.raises(ValueError, match=r"expected 2:4, 4:8, \.\.\., 50% or 0\.5"):
            _core.Pattern(bad)


@pytest.mark.parametrize("what", ["weight", "activations"])
def test_transposed_views_are_refused(what: str) -> None:
    turned = np.ones((8, 12), np.float32).T  # [12, 8]
    operator = dataclasses.replace(Case.random(12, 8).operator("2:4"), weight=turned)
    with pytest.raises((ValueError, TypeError), match="C-contiguous"):
        run("wanda", operator) if what == "weight" else _core.Statistics(8).add(turned)


@pytest.mark.parametrize("what", ["weight", "heldout"])
@methods
def test_other_widths_than_the_statistics_are_refused(method: str, what: str) -> None:
    operator = Case.random(4, 16).operator("2:4")
    other: Any = operator.weight.reshape(8, 8)
    if what == "heldout":
        other = statistics(np.ones((20, 8), np.float32))
    with pytest.raises(ValueError, match="columns"):
        run(method, dataclasses.replace(operator, **{what: other}))


def test_dense_activations_of_another_shape_are_refused() -> None:
    x = np.ones((10, 8), np.float32)
    with pytest.raises(ValueError, match="dense"):
        _core.Statistics(8, corrected=True).add(x, x.reshape(8, 10))


@methods
def test_a_weight_that_is_not_finite_has_no_certificate_of_zero(method: str) -> None:
    operator = Case.random(4, 16).operator("2:4")
    operator.weight[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"weight: non-finite value at flat index 18"):
        run(method, operator)


def test_statistics_of_no_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="width"):
        _core.Statistics(0).add(np.ones((3, 0), np.float32))


def test_activations_whose_squares_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="non-finite"):
        Case.random(4, 16).operator("2:4").calibration.add(np.full((4, 16), 1e20, np.float32))


@pytest.mark.parametrize("bad", [-1.0, np.nan])
def test_a_lambda_out_of_range_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="lambda"):
        run("fista", Case.random(4, 16).operator("2:4"), lambda_start=bad)
