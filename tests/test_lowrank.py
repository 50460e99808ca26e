"""Truncated decompositions and regressions of the core against full ones in NumPy."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsprune import _core, reference

SHAPES = st.tuples(st.integers(1, 150), st.integers(1, 150))
SEEDS = st.integers(0, 2**32 - 1)


def decaying(shape: tuple[int, int], seed: int, decay: float = 0.9) -> np.ndarray:
    """A matrix whose singular values fall by `decay` each."""
    chance = np.random.default_rng(seed)
    u, s, v = np.linalg.svd(chance.standard_normal(shape), full_matrices=False)
    return ((u * s[0] * decay ** np.arange(len(s))) @ v).astype(np.float32)


@settings(deadline=None, max_examples=25)
@given(SHAPES, SEEDS, st.data())
def test_the_svd_is_that_of_numpy(shape: tuple[int, int], seed: int, data: Any) -> None:
    weight = decaying(shape, seed)
    rank = data.draw(st.integers(1, min(shape)))
    left, values, right = _core.truncated_svd(weight, "F32", rank=rank)
    expected = reference.truncated_svd(weight.astype(np.float64), rank)
    scale = expected[1][0]
    assert np.allclose(values, expected[1], atol=1e-4 * scale)
    best = (expected[0].T * expected[1]) @ expected[2]
    error = np.linalg.norm(weight - (left.T * values) @ right)
    assert error <= np.linalg.norm(weight - best) * 1.001 + 1e-4 * scale
    strong = values > 1e-3 * scale  # the others may be zero, as where the rank is used up
    for rows in (left[strong], right[strong]):
        assert np.allclose(rows @ rows.T, np.eye(strong.sum()), atol=1e-3)


def test_small_matrices_are_captured_whole() -> None:
    for seed in range(100):
        weight = decaying((2, 2 + seed % 3), seed)
        values = _core.truncated_svd(weight, "F32", rank=2, seed=seed)[1]
        assert np.allclose(values, np.linalg.svd(weight)[1], rtol=1e-4), seed


def test_flat_spectra_are_captured_and_threads_change_no_bit() -> None:
    weight = np.random.default_rng(0).standard_normal((200, 260)).astype(np.float32)
    found = [_core.truncated_svd(weight, "F32", rank=20, threads=threads) for threads in (1, 2, 5)]
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))
    most = np.square(reference.truncated_svd(weight, 20)[1]).sum()
    assert np.square(found[0][1]).sum() > 0.999 * most
    assert not np.array_equal(_core.truncated_svd(weight, "F32", rank=20, seed=1)[0], found[0][0])


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(1, 8), st.integers(1, 6))
def test_pairs_are_compared_as_by_their_own_svd(seed: int, of: int, rank: int) -> None:
    one, other = decaying((30, 41), seed), decaying((30, 41), seed + 1)
    triples = [_core.truncated_svd(weight, "F32", rank=of) for weight in (one, other)]
    found = _core.pair_distance(*triples, rank=rank)
    expected = reference.pair_distance(one, other, of=of, rank=rank)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4 * float(np.square(one).sum()))
    assert _core.pair_distance(triples[0], triples[0], rank=rank) == pytest.approx(0, abs=1e-5)


def sums(x: np.ndarray, targets: np.ndarray | None, threads: int = 1) -> _core.Regression:
    made = _core.Regression(x.shape[1], 0 if targets is None else targets.shape[1])
    for part in range(0, len(x), 64):
        some = None if targets is None else targets[part : part + 64]
        made.add(x[part : part + 64], some, threads=threads)
    assert made.tokens == len(x)
    return made


def problem(seed: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs with one strong channel, and targets that they explain in part."""
    chance = np.random.default_rng(seed)
    x = chance.standard_normal((3 * inputs + 40, inputs)).astype(np.float32)
    x[:, 0] *= 300
    mixed = x @ decaying((inputs, outputs), seed, 0.8)
    return x, (mixed + chance.standard_normal(mixed.shape)).astype(np.float32)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(2, 140), st.integers(1, 140), st.data())
def test_regressions_of_reduced_rank_are_optimal(
    seed: int, inputs: int, outputs: int, data: Any
) -> None:
    rank = data.draw(st.none() | st.integers(1, min(inputs, outputs)))
    damping = data.draw(st.sampled_from([1e-3, 1e-1]))
    x, targets = problem(seed, inputs, outputs)
    output, given_, facts = sums(x, targets).fit(None, rank=rank, dampings=[damping])
    found = given_ if output is None else output.T @ given_
    best = reference.reduced_rank(
        x.astype(np.float64), targets.astype(np.float64), rank=rank, damping=damping
    )

    def objective(d: np.ndarray) -> float:
        penalty = damping * np.square(d * np.sqrt(np.square(x).sum(0))).sum()
        return float(np.square(targets - x @ d.T).sum() + penalty)

    assert objective(found.astype(np.float64)) <= objective(best) * (1 + 1e-3)
    loss = float(np.square(targets - x @ found.T).sum())
    assert facts["loss"][0] == pytest.approx(loss, rel=1e-2, abs=1e-5 * facts["loss"][1])
    assert facts["loss"][1] == pytest.approx(np.square(targets).sum(), rel=1e-4)


def test_held_out_tokens_choose_the_penalty() -> None:
    x, targets = problem(3, 60, 50)
    x[:, 0] /= 300
    targets = np.random.default_rng(0).standard_normal(targets.shape).astype(np.float32)
    few, many = sums(x[:70], targets[:70]), sums(x[70:], targets[70:])
    dampings = [1e-4, 1e-2, 1e-1, 1.0]
    losses = [few.fit(many, rank=None, dampings=[d])[2]["heldout"][0] for d in dampings]
    facts = few.fit(many, rank=None, dampings=dampings)[2]
    assert facts["heldout"][0] == min(losses) < losses[0]
    assert facts["damping"] == dampings[losses.index(min(losses))]


@settings(deadline=None, max_examples=15)
@given(SEEDS, st.integers(2, 140), st.integers(1, 140), st.data())
def test_factors_are_closest_on_the_inputs(seed: int, inputs: int, rows: int, data: Any) -> None:
    rank = data.draw(st.integers(1, min(inputs, rows)))
    x, weight = problem(seed, inputs, 1)[0], decaying((rows, inputs), seed + 1)
    output, given_ = sums(x, None).factors(weight, "F32", rank=rank)
    nearest = reference.factors(x.astype(np.float64), weight.astype(np.float64), rank=rank)
    error = np.linalg.norm(x @ (weight - output.T @ given_).T)
    scale = np.linalg.norm(x @ weight.T)
    assert error <= np.linalg.norm(x @ (weight - nearest).T) * 1.001 + 1e-3 * scale


def test_channels_without_a_value_take_no_part() -> None:
    x, targets = problem(5, 20, 9)
    x[:, 7] = 0
    output, given_, _ = sums(x, targets).fit(None, rank=4, dampings=[1e-3])
    assert output is not None
    assert np.isfinite(given_).all()
    assert (given_[:, 7] == 0).all()


def test_threads_change_no_bit_of_a_regression() -> None:
    x, targets = problem(6, 200, 130)
    found = [sums(x, targets, t).fit(None, rank=9, dampings=[0.01], threads=t) for t in (1, 2, 5)]
    for other in found[1:]:
        assert np.array_equal(found[0][1], other[1])
        assert np.array_equal(found[0][0], other[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda r: _core.truncated_svd(np.eye(3, dtype=np.float32), "F32", rank=4),
         "rank: expected 1 to 3, found 4"),
        (lambda r: r.fit(None, rank=3, dampings=[0.1]), "rank: expected 1 to 2, found 3"),
        (lambda r: r.fit(None, rank=1, dampings=[]), "dampings: expected one, found none"),
        (lambda r: r.add(np.ones((3, 5), np.float32)), "x: expected 4 columns, found 5"),
        (lambda r: r.add(np.ones((3, 4), np.float32)), "targets: expected 3 x 2, found 0 values"),
        (lambda r: r.add(np.full((1, 4), np.nan, np.float32), np.ones((1, 2), np.float32)),
         "inputs: non-finite value at flat index 0"),
        (lambda r: r.factors(np.ones((3, 5), np.float32), "F32", rank=1),
         "weight: expected 4 columns, found 5"),
        (lambda r: _core.Regression(0, 1), "inputs: expected at least one channel, found 0"),
    ],
)  # fmt: skip
def test_refusals_name_what_is_wrong(call: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        call(_core.Regression(4, 2))
