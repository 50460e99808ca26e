"""Massive tokens: what is scaled down, by how much, and that nothing else changes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsprune import methods
from rsprune.clip import clip_tokens
from rsprune.config import Config
from rsprune.errors import UsageError


def rows(seed: int, tokens: int = 9, channels: int = 5) -> torch.Tensor:
    return torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000), st.floats(0.5, 10.0), st.integers(1, 12))
def test_no_token_is_above_the_limit_and_directions_stay(seed: int, limit: float, tokens: int):
    own, dense = rows(seed, tokens), rows(seed + 1, tokens)
    own[0, 0] *= 100
    found, other = clip_tokens(own, dense, limit)
    assert other is not None
    size = np.linalg.norm(own[0].numpy(), axis=1)
    bound = limit * np.sort(size)[(tokens - 1) // 2]  # torch's median is the lower of two
    factor = np.minimum(1, bound / size)[:, None]
    np.testing.assert_allclose(found[0].numpy(), own[0].numpy() * factor, rtol=1e-5)
    np.testing.assert_allclose(other[0].numpy(), dense[0].numpy() * factor, rtol=1e-5)


def test_what_is_not_massive_is_handed_through():
    own = rows(3)
    own[0, 2] = own[0, 1] * 50
    assert clip_tokens(own, None, 0.0)[0] is own
    even = torch.ones(1, 4, 3)
    assert clip_tokens(even, None, 1.5)[0] is even
    assert clip_tokens(own, None, 4.0)[0] is not own


def test_what_is_not_finite_stays_so_and_zeros_stay_zeros():
    own = rows(4)
    own[0, 1, 1] = torch.inf
    assert not clip_tokens(own, None, 2.0)[0].isfinite().all()
    own[0, 1, 1] = torch.nan
    assert not clip_tokens(own, None, 2.0)[0].isfinite().all()
    mostly_empty = torch.zeros(1, 5, 3)
    mostly_empty[0, 0] = 1.0
    assert clip_tokens(mostly_empty, None, 2.0)[0] is mostly_empty


def test_the_user_goes_before_the_method():
    method = methods.get("best")
    assert methods.inputs_of(method, Config()).clip_tokens == method.inputs.clip_tokens
    assert methods.inputs_of(method, Config(clip_tokens=7.0)).clip_tokens == 7.0
    assert methods.inputs_of(methods.get("sparsegpt"), Config()).clip_tokens == 0.0
    with pytest.raises(UsageError, match="clip_tokens"):
        Config.create(clip_tokens=-1.0)
