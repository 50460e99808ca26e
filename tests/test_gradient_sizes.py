"""Sizes of weight gradients, against the twin that makes the gradient."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsprune import _core, reference

SHAPES = st.tuples(st.integers(0, 40), st.integers(1, 130), st.integers(1, 60))


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, dtype=st.sampled_from(["F32", "BF16", "F16"]), seed=st.integers(0, 2**32 - 1))
def test_sizes_are_those_of_the_gradient_for_any_threads(shape, dtype, seed):
    tokens, m, n = shape
    chooser = np.random.default_rng(seed)
    d, a = (chooser.normal(size=(tokens, k)).astype(np.float32) for k in (m, n))
    w = reference.narrow(chooser.normal(size=(m, n)).astype(np.float32), dtype)
    expected = reference.gradient_sizes(d, a, reference.widen(w, dtype))
    found = [_core.gradient_sizes(d, a, w, dtype, threads=threads) for threads in (1, 2, 5)]
    assert found[0] == found[1] == found[2]
    assert found[0] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    squares = [_core.gradient_squares(d, a, threads=threads) for threads in (1, 2, 5)]
    assert squares[0] == squares[1] == squares[2]
    assert squares[0] == pytest.approx(expected[1], rel=1e-4, abs=1e-4)
    assert reference.gradient_squares(d, a) == pytest.approx(expected[1], rel=1e-9, abs=1e-9)


def test_what_does_not_fit_together_is_refused():
    d, a, w = (np.zeros(shape, np.float32) for shape in ((3, 4), (3, 5), (4, 6)))
    with pytest.raises(ValueError, match="weight: expected 4 x 5"):
        _core.gradient_sizes(d, a, w, "F32")
    with pytest.raises(ValueError, match="expected 3 tokens"):
        _core.gradient_squares(d, np.zeros((2, 5), np.float32))
    with pytest.raises(TypeError, match="BF16 needs"):
        _core.gradient_sizes(d, a, w, "BF16")
