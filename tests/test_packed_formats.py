"""Packed formats against their twin, against golden bytes, and against broken parts."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_cases import (
    FORMATS,
    GOLDEN,
    WORDS,
    as_core,
    from_bits,
    golden,
    twin_parts,
    weight_of,
)

from rsprune import _core
from rsprune.packing import PackedWeight, planned_bytes
from rsprune.reference import pack as twin


@settings(max_examples=120, deadline=None)
@given(
    form=st.sampled_from(FORMATS),
    dtype=st.sampled_from(list(WORDS)),
    rows=st.integers(1, 6),
    groups=st.integers(1, 150),
    seed=st.integers(0, 2**32 - 1),
)
def test_packs_as_the_twin_and_unpacks_what_was_packed(form, dtype, rows, groups, seed):
    weight, form = weight_of(form, dtype, rows, groups, seed)
    packed = PackedWeight(form, dtype, weight.shape)
    parts = packed.pack(as_core(weight, dtype))
    expected = twin_parts(weight, form, dtype)
    assert parts.keys() == expected.keys() == {part for part, _, _ in packed.layout}
    for part, value in parts.items():
        assert value.tobytes() == np.ascontiguousarray(expected[part]).tobytes(), part
    assert sum(value.nbytes for value in parts.values()) == packed.nbytes
    assert packed.unpack(parts).tobytes() == weight.tobytes()
    middle = rows // 2
    assert packed.unpack(parts, middle, rows).tobytes() == weight[middle:].tobytes()
    if not form.startswith("signs"):
        assert np.array_equal(twin.unpack(expected, form, weight.shape, weight.dtype), weight)


def test_golden_bytes():
    cases = json.loads(GOLDEN.read_text())
    assert cases == golden()  # the twin has not changed
    assert [case["format"].split()[0] for case in cases] == [f.split()[0] for f in FORMATS]
    for case in cases:
        packed = PackedWeight(case["format"], case["dtype"], tuple(case["shape"]))
        parts = {k: np.frombuffer(bytes.fromhex(v), np.uint8) for k, v in case["parts"].items()}
        weight = packed.unpack(parts)
        assert weight.tobytes().hex() == case["weight"]
        repacked = packed.pack(weight)
        assert {part: v.tobytes().hex() for part, v in repacked.items()} == case["parts"]


def test_the_smallest_format_is_chosen():
    signs, form = weight_of("signs 3:8", "BF16", 4, 40, seed=1)
    assert _core.pack_format(signs, "BF16", _core.Pattern("3:8")) == form
    assert len(np.unique(np.abs(from_bits(signs, "BF16")))) > 2  # blocks with other scales
    values, _ = weight_of("keep-of 3:8", "BF16", 4, 40, seed=1)
    assert _core.pack_format(values, "BF16", _core.Pattern("3:8")) == "keep-of 3:8"
    count = np.count_nonzero(values)
    assert _core.pack_format(values, "BF16", _core.Pattern("50%")) == f"bitmap {count}"


@pytest.mark.parametrize(("shape", "bits"), [((576, 1536), 9.0), ((14336, 4096), 9.0)])
def test_2_of_4_takes_nine_bits(shape, bits):
    packed = PackedWeight("keep-of 2:4", "BF16", shape)
    assert packed.bits == bits
    assert planned_bytes("BF16", shape, "2:4", 0.5) == packed.nbytes


def test_a_plan_is_never_too_small():
    weight, form = weight_of("bitmap", "BF16", 7, 33, seed=3)
    zeros = 1 - np.count_nonzero(weight) / weight.size
    assert planned_bytes("BF16", weight.shape, "x%", zeros) >= (
        PackedWeight(form, "BF16", weight.shape).nbytes
    )
    assert planned_bytes("BF16", (8, 64), "4:4", 0.0) == 8 * 64 * 2  # dense is smaller


def test_broken_parts_are_named():
    weight, form = weight_of("signs 2:8", "BF16", 3, 9, seed=4)
    packed = PackedWeight(form, "BF16", weight.shape)
    parts = packed.pack(weight)
    cases = {
        "positions: expected 18 bytes, found 17 bytes": {
            "positions": parts["positions"].reshape(-1)[:-1]
        },
        "positions: row 0: group 0: expected a code below 28, found 31": {
            "positions": parts["positions"] | np.uint8(31)
        },
        "signs: row 0: expected zero bits after the last item": {
            "signs": parts["signs"] | np.uint8(0x80)
        },
        "scales: row 0: expected a finite number": {
            "scales": np.full_like(parts["scales"], 0x7C00)
        },
    }
    for message, broken in cases.items():
        with pytest.raises(ValueError, match=message):
            packed.unpack(parts | broken)
    with pytest.raises(ValueError, match="part scales: missing"):
        packed.unpack({k: v for k, v in parts.items() if k != "scales"})
    with pytest.raises(ValueError, match="expected positions, signs, scales, found"):
        packed.unpack(parts | {"more": parts["signs"]})


def test_arguments_of_the_binding():
    weight, form = weight_of("keep-of 2:4", "F32", 2, 4, seed=5)
    with pytest.raises(TypeError, match="C-contiguous"):
        _core.pack(np.asfortranarray(as_core(weight, "F32")), "F32", form)
    with pytest.raises(TypeError, match="float32"):
        _core.pack(weight, "F32", form)
    with pytest.raises(ValueError, match="unknown, expected one of keep-of n:m"):
        _core.pack_layout("zip", "F32", (2, 4))
    packed = PackedWeight(form, "F32", weight.shape)
    parts = packed.pack(as_core(weight, "F32"))
    with pytest.raises(ValueError, match=r"rows: expected a range within 0\.\.2, found 1\.\.3"):
        packed.unpack(parts, 1, 3)
