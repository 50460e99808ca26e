"""Refit, local search and polish: against their twins, and what holds for them on any input.

The core works in float32: a choice between points that are nearly as good may fall on the other
side, what follows then differs, and only errors can be compared. On these problems it does not
happen, so masks are compared too; a row keeps about 16 weights, which the core's 20 steps of
conjugate gradients solve as exactly as its twin does.
"""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cases import Case, bits_equal, polish, run, score

from rsprune import reference
from rsprune.reference.local_search import swaps

M, N = 24, 32
GROUPS, SWAPS = (
    [("2:4", "row"), ("4:8", "row")],
    [("8:16", "row"), ("50%", "row"), ("50%", "matrix")],
)
patterns = pytest.mark.parametrize(("text", "scope"), GROUPS + SWAPS)
corrections = pytest.mark.parametrize("corrected", [False, True])
judges = pytest.mark.parametrize("judged", [False, True])

SEARCH_DAMPING = 0.01
"""Of a local search that no refit precedes."""
ROUNDING = 2e-6
"""What the relative norm of an error may gain when a point that was judged is then stored."""

quick = settings(max_examples=40, deadline=None)
cases = st.builds(
    Case.random,
    m=st.integers(1, 12),
    n=st.sampled_from([16, 32, 48]),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
    corrected=st.booleans(),
    tokens=st.sampled_from([None, 12, 500]),
)
some_pattern = st.sampled_from(["2:4", "1:4", "4:8", "8:16", "4:4", "0%", "37%", "50%", "0.9"])
some_scope = st.sampled_from(["row", "matrix"])
some_start = st.sampled_from(["magnitude", "wanda", "sparsegpt"])


def wanda(case: Case, text: str, scope: str) -> np.ndarray:
    return run("wanda", case.operator(text, scope))[0]


@corrections
def test_scaled_variables_pose_the_same_problem(corrected: bool) -> None:
    case = Case.random(M, N, corrected=corrected)
    values, scaled = wanda(case, "2:4", "row").astype(np.float64), case.scaled
    energy = ((case.values @ case.twin.dense_gram) * case.values).sum() / case.twin.mean_square
    assert 2 * case.damped(values, 0.0) / energy == pytest.approx(case.error(values), rel=1e-9)
    np.testing.assert_allclose(np.diag(scaled.statistics.gram), 1.0)
    step = 1e-6 * np.random.default_rng(0).standard_normal((M, N))
    gradient, point = scaled.gradient(values * scaled.roots, 0.1), values * scaled.roots
    rise = scaled.objective(point + step, 0.1) - scaled.objective(point - step, 0.1)
    assert rise == pytest.approx(2 * (gradient * step).sum(), rel=1e-6)


@corrections
def test_an_exact_refit_has_no_slope_on_its_mask(corrected: bool) -> None:
    case = Case.random(M, N, corrected=corrected)
    start = wanda(case, "2:4", "row") * case.scaled.roots
    exact = reference.refit(case.scaled, start, 0.1)
    slope = case.scaled.gradient(exact, 0.1)
    assert np.abs(slope[start != 0]).max() < 1e-9 < np.abs(slope[start == 0]).mean()
    np.testing.assert_allclose(reference.refit(case.scaled, start, 0.1, 40), exact, atol=1e-4)


@patterns
@corrections
@judges
def test_refit(text: str, scope: str, corrected: bool, judged: bool) -> None:
    case = Case.random(M, N, corrected=corrected)
    start = wanda(case, text, scope)
    found, certificate = polish(case.operator(text, scope, judged=judged), start, search=False)
    heldout = case.heldout_twin if judged else None
    arguments = (case.values, reference.Pattern(text, scope), case.twin, heldout, start)
    twin = reference.polish(*arguments, search=False)
    np.testing.assert_array_equal(found == 0, start == 0)
    assert certificate["refit_damping"] == twin.damping
    assert certificate["refit_damping"] == 0.01 or judged  # what fits best where nothing judges
    # Rungs above the first take ten steps from the one below, where the twin solves exactly.
    assert np.abs(found - twin.values).max() < 3e-3 * np.abs(twin.values).max()
    assert score(certificate, judged=judged) == pytest.approx(twin.score, rel=5e-4)
    assert twin.score < 0.9 * case.error(start, heldout=judged)


def test_held_out_tokens_choose_other_dampings() -> None:
    chosen = []
    for tokens in (N, 2 * N, 50 * N):
        certificate = run("polish", Case.random(M, N, tokens=tokens).operator("2:4"))[1]
        chosen.append(certificate["refit_damping"])
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > chosen[-1]


@patterns
@corrections
def test_twenty_steps_refit_wide_rows_nearly_exactly(
    text: str, scope: str, corrected: bool
) -> None:
    case = Case.random(M, 128, corrected=corrected)
    start = wanda(case, text, scope)
    found, certificate = polish(case.operator(text, scope, judged=False), start, search=False)
    damping = certificate["refit_damping"]
    roots = case.scaled.roots
    least = case.damped(reference.refit(case.scaled, start * roots, damping) / roots, damping)
    gap, whole = case.damped(found, damping) - least, case.damped(start, damping) - least
    assert -1e-6 * whole < gap < 1e-4 * whole


@pytest.mark.parametrize(("text", "n"), [("2:4", 4), ("4:8", 8), ("1:16", 16)])
@corrections
def test_the_search_of_a_single_group_is_exhaustive(text: str, n: int, corrected: bool) -> None:
    """All masks of a row, each refitted exactly, by no code that searches."""
    case = Case.random(M, n, tokens=40, corrected=corrected)
    keep, roots = int(text.split(":")[0]), case.scaled.roots
    masks = np.array([np.isin(np.arange(n), kept) for kept in combinations(range(n), keep)])
    start = wanda(case, text, "row")
    best = np.zeros((M, n))
    for row in range(M):
        one = dataclasses.replace(case, weight=case.weight[row : row + 1])
        points = [reference.refit(one.scaled, mask[None] * 1.0, SEARCH_DAMPING) for mask in masks]
        best[row] = min(points, key=lambda p: one.scaled.objective(p, SEARCH_DAMPING))[0] / roots
    found, certificate = polish(case.operator(text, judged=False), start, refit=False)
    assert certificate["search_kept"]
    assert ((best != 0) != (start != 0)).any()
    np.testing.assert_array_equal(found != 0, best != 0)
    assert np.abs(found - best).max() < 1e-3 * np.abs(best).max()


def test_a_swap_changes_the_objective_by_what_it_says() -> None:
    case = Case.random(1, N, corrected=True)
    start = (wanda(case, "50%", "row") * case.scaled.roots)[0]
    hessian = case.scaled.hessian(0.1)
    linear = (case.scaled.linear - case.scaled.weight @ hessian)[0]
    before, changes = case.scaled.objective(start[None], 0.1), []
    for change, out, into, value, _ in swaps(hessian, linear, start, np.arange(N)):
        after = start.copy()
        after[out], after[into] = 0.0, value
        assert case.scaled.objective(after[None], 0.1) - before == pytest.approx(change, abs=1e-12)
        changes.append(change)
    assert len(changes) == 64
    assert min(changes) < 0 < max(changes)


@pytest.mark.parametrize(
    ("text", "scope", "corrected"),
    [(*pattern, corrected) for pattern in [*GROUPS, SWAPS[0]] for corrected in (False, True)]
    + [
        ("50%", "row", False),
        ("50%", "row", True),
        ("50%", "matrix", False),
        ("50%", "matrix", True),
    ],
)
def test_local_search(text: str, scope: str, corrected: bool) -> None:
    case = Case.random(M, N, corrected=corrected)
    start = wanda(case, text, scope)
    found, certificate = polish(case.operator(text, scope, judged=False), start, refit=False)
    pattern, roots = reference.Pattern(text, scope), case.scaled.roots
    arguments = (case.scaled, pattern, start * roots)
    twin = reference.local_search(*arguments, damping=SEARCH_DAMPING) / roots
    assert certificate["search_kept"]
    assert ((twin != 0) != (start != 0)).sum() > 0.05 * twin.size
    np.testing.assert_array_equal(found != 0, twin != 0)
    least, before = case.damped(twin, SEARCH_DAMPING), case.damped(start, SEARCH_DAMPING)
    assert case.damped(found, SEARCH_DAMPING) == pytest.approx(least, rel=1e-5)
    assert least < 0.7 * before


@patterns
@corrections
@judges
def test_polish(text: str, scope: str, corrected: bool, judged: bool) -> None:
    case = Case.random(M, N, corrected=corrected)
    start = wanda(case, text, scope)
    found, certificate = polish(case.operator(text, scope, judged=judged), start)
    heldout = case.heldout_twin if judged else None
    arguments = (case.values, reference.Pattern(text, scope), case.twin, heldout, start)
    twin = reference.polish(*arguments, steps=20)
    assert (certificate["refit_damping"], certificate["search_kept"]) == (twin.damping, twin.search)
    assert ((found != 0) == (twin.values != 0)).mean() > 0.99
    assert score(certificate, judged=judged) == pytest.approx(twin.score, rel=1e-3)
    assert certificate["error"] == pytest.approx(case.error(found), rel=1e-4)
    assert certificate["heldout_error"] is None or judged


@quick
@given(cases, some_pattern, some_scope, some_start, st.booleans(), st.booleans(), st.booleans())
def test_polish_never_does_harm(
    case: Case, text: str, scope: str, method: str, refit: bool, search: bool, judged: bool
) -> None:
    operator = case.operator(text, scope, judged=judged)
    start, before = run(method, operator)
    found, after = polish(operator, start, refit=refit, search=search)
    values = reference.widen(found, case.dtype)
    limit = (score(before, judged=judged) ** 0.5 + ROUNDING) ** 2 + 1e-7
    assert score(after, judged=judged) <= limit
    assert case.error(values, heldout=judged) <= limit
    assert (found.shape, found.dtype) == (start.shape, start.dtype)
    assert reference.Pattern(text, scope).holds(values)
    assert after["sparsity"] == (values == 0).mean()
    assert ("refit_damping" in after, "search_kept" in after) <= (refit, search)
    if not search:
        assert not values[reference.widen(start, case.dtype) == 0].any()


@quick
@given(cases, some_pattern, some_scope, some_start)
def test_local_search_never_raises_the_damped_objective(
    case: Case, text: str, scope: str, method: str
) -> None:
    case = dataclasses.replace(case, weight=case.values.astype(np.float32), dtype="F32")
    operator = case.operator(text, scope, judged=False)
    start = run(method, operator)[0]
    found = polish(operator, start, refit=False)[0]
    before = case.damped(start, SEARCH_DAMPING)
    assert case.damped(found, SEARCH_DAMPING) <= before * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_nothing_to_do_changes_nothing(dtype: str) -> None:
    case = Case.random(M, N, dtype=dtype)
    start = wanda(case, "2:4", "row")
    found = polish(case.operator("2:4"), start, refit=False, search=False)[0]
    if dtype == "F32":  # to scaled variables and back
        np.testing.assert_array_max_ulp(found, start, maxulp=1)
    else:
        assert bits_equal(found, start)
    for whole in ("4:4", "0%"):
        found, certificate = polish(case.operator(whole), case.weight)
        assert certificate["error"] < 1e-12
        assert "refit_damping" not in certificate
        assert not certificate["search_kept"]


@pytest.mark.parametrize("text", ["2:4", "8:16", "50%"])
@pytest.mark.parametrize("search", [False, True])
def test_dead_channels_keep_their_weights_until_a_live_one_wants_the_place(
    text: str, search: bool
) -> None:
    case = Case.random(M, 48)
    dead = [3, 17, 18, 19, 47]
    case.x[:, dead] = 0
    operator = case.operator(text)
    start = run("magnitude", operator)[0]
    assert (start[:, dead] != 0).mean() > 0.3
    found, certificate = polish(operator, start, search=search)
    assert certificate["dead_channels"] == 5
    assert np.isfinite(found).all()
    assert certificate["error"] == pytest.approx(case.error(found), rel=1e-4)
    kept = (found[:, dead] != 0) & (start[:, dead] != 0)
    np.testing.assert_allclose(found[:, dead][kept], case.weight[:, dead][kept], rtol=1e-6)
    live = np.array(dead)[[0, 4]]  # in groups with enough live channels
    assert (found[:, live] != 0).sum() < (start[:, live] != 0).sum() or not search
    assert (found[:, live] != 0).any() or search


def test_values_that_are_refused() -> None:
    case = Case.random(8, 16)
    start = wanda(case, "2:4", "row")
    outside = start.copy()
    outside[2, np.flatnonzero(outside[2] == 0)[0]] = 1.0
    shape = r"values: expected the weight's shape \(8, 16\), found \(5, 16\)"
    pattern = "values: expected the pattern 2:4"
    for values, message in ((outside, pattern), (case.weight, pattern), (start[:5], shape)):
        with pytest.raises(ValueError, match=message):
            polish(case.operator("2:4"), values)
    for bad in (np.nan, np.inf):
        spoiled = start.copy()
        spoiled[start != 0] = bad
        with pytest.raises(ValueError, match="non-finite"):
            polish(case.operator("2:4"), spoiled)
    with pytest.raises(TypeError, match="F32 needs a 2-D C-contiguous float32"):
        polish(case.operator("2:4"), start.astype(np.float64))


def test_values_of_another_shape_are_refused() -> None:
    case = Case.random(8, 16)
    with pytest.raises(ValueError, match="expected"):
        polish(case.operator("2:4"), wanda(case, "2:4", "row").reshape(16, 8))


@pytest.mark.parametrize("text", ["2:4", "4:8", "8:16", "50%"])
def test_the_search_does_not_depend_on_the_units_of_the_weight(text: str) -> None:
    case, masks = Case.random(M, 64), []
    for power in (-20, 0, 20):  # exact in float32
        weight = np.ldexp(case.weight, power)
        scaled: Any = dataclasses.replace(case, weight=weight)
        found = polish(scaled.operator(text, judged=False), wanda(scaled, text, "row"), refit=False)
        masks.append(found[0] != 0)
    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(masks[2], masks[1])
