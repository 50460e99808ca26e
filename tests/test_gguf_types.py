"""The stored types of GGUF export: golden bytes, and exactness against loops over single values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("gguf")

from rsprune.gguf_types import TYPES, NotExactError, decode, encode, sizes

PLACES = {"TQ1_0": 256, "TQ2_0": 256, "Q1_0": 128}


def block(kind: str, scale: float) -> np.ndarray:
    """+a at places that are a multiple of 3, -a at the next ones, 0 (or -a) at the others."""
    rest = -1.0 if kind == "Q1_0" else 0.0
    codes = [(1.0, -1.0, rest)[place % 3] for place in range(PLACES[kind])]
    return np.array(codes, np.float32) * np.float32(scale)


def slow(kind: str, raw: bytes) -> list[float]:
    """Values one by one, from ggml's description of the layouts."""
    if kind == "Q1_0":
        a = float(np.frombuffer(raw[:2], np.float16)[0])
        return [a if raw[2 + j // 8] >> (j % 8) & 1 else -a for j in range(128)]
    a = float(np.frombuffer(raw[-2:], np.float16)[0])
    if kind == "TQ2_0":
        return [
            a * ((raw[j // 128 * 32 + j % 32] >> (j // 32 % 4 * 2) & 3) - 1) for j in range(256)
        ]
    digits = []  # the n-th digit of base 3 of byte q, which holds ceil(value * 256 / 243)
    for start, count, places in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        for place in range(places):
            for byte in raw[start : start + count]:
                digits.append(((byte * 3**place) % 256) * 3 // 256)
    return [a * (digit - 1) for digit in digits]


GOLDEN = {
    "F32": "0000c03f000000c0",
    "F16": "003e00c0",
    "BF16": "c03f00c0",
    "Q1_0": "0038" + "499224" * 5 + "49",
    "TQ2_0": "861861" * 21 + "86" + "0038",
    "TQ1_0": "cf456c" * 10 + "cf45" + "3194bb" * 5 + "31" + "bb3092bb" + "0038",
}


def test_golden_bytes():
    for kind in ("F32", "F16", "BF16"):
        encoded = encode(np.array([1.5, -2.0], np.float32), kind)
        assert encoded.tobytes().hex() == GOLDEN[kind]
    for kind in PLACES:
        assert encode(block(kind, 0.5), kind).tobytes().hex() == GOLDEN[kind], kind


@pytest.mark.parametrize("kind", list(PLACES))
def test_layouts_are_those_of_ggml(kind: str):
    values = block(kind, 0.5)
    encoded = encode(values, kind)
    assert len(encoded) == sizes(kind)[1]
    assert slow(kind, encoded.tobytes()) == values.tolist()


@given(
    kind=st.sampled_from(list(PLACES)),
    bits=st.integers(0, 0x7BFF),
    seed=st.integers(0, 2**32 - 1),
    blocks=st.integers(1, 3),
)
def test_every_scale_of_half_precision_is_held(kind: str, bits: int, seed: int, blocks: int):
    scale = np.array([bits], np.uint16).view(np.float16).astype(np.float32)
    chooser = np.random.default_rng(seed)
    choices = [-1, 1] if kind == "Q1_0" else [-1, 0, 1]
    codes = chooser.choice(choices, (blocks, PLACES[kind])).astype(np.float32)
    values = (codes * scale * np.float32(1.0)).reshape(-1)
    encoded = encode(values, kind)
    assert np.array_equal(decode(encoded, kind), values)
    lone = encoded.reshape(blocks, -1)[0].tobytes()
    assert slow(kind, lone) == values[: PLACES[kind]].tolist()


@given(
    kind=st.sampled_from(list(PLACES)),
    place=st.integers(0, 511),
    value=st.floats(-4, 4, width=32),
)
def test_a_single_other_value_is_found(kind: str, place: int, value: float):
    size = PLACES[kind]
    values = np.concatenate([block(kind, 0.5)] * (512 // size))
    values[place] = value
    held = (-0.5, 0.5) if kind == "Q1_0" else (-0.5, 0.0, 0.5)
    if value in held:
        assert np.array_equal(decode(encode(values, kind), kind), values)
        return
    with pytest.raises(NotExactError) as caught:
        encode(values, kind)
    assert caught.value.at == place // size * size


def test_types_without_a_block_take_any_length():
    values = np.array([0.0, -0.0, 1.0, 65504.0, 2.0**-24], np.float32)
    for kind in TYPES[:2]:
        assert decode(encode(values, kind), kind).tobytes() == values.tobytes()
