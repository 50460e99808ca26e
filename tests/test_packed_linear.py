"""Products with packed linears: against the unpacked weight in float64, mode by mode.

Every instruction set is tested in the core (`packed/tests.rs`); here it is the one of this CPU.
"""

import copy
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rsprune import _core
from rsprune.errors import RspruneError, UsageError
from rsprune.packed_linear import PackedLinear, int8_errors, set_compute
from rsprune.packing import PackedWeight

NUMPY = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FORMATS = ("keep-of 2:4", "keep-of 5:8", "keep-of 1:16", "bitmap", "signs 2:8", "signs 3:4",
           "signs 4:8", "signs 8:8")  # fmt: skip


def dense_weight(form: str, dtype: str, shape: tuple[int, int], seed: int) -> Tensor:
    """A weight that the format holds; some rows are zero where it may."""
    rng = np.random.default_rng(seed)
    rows, cols = shape
    weight = rng.standard_normal(shape)
    if form == "bitmap":
        weight = np.where(rng.random(shape) < rng.random((rows, 1)), weight, 0.0)
        return torch.from_numpy(weight).to(TORCH[dtype])
    keep, of = map(int, form.split()[1].split(":"))
    mask = rng.random((rows, cols // of, of)).argsort(-1) < keep
    if form.startswith("signs"):
        scales = (rng.integers(1, 99, (rows, -(-cols // 256))) / 64).repeat(256, 1)[:, :cols]
        weight = np.where(weight < 0, -scales, scales)
    return torch.from_numpy(np.where(mask.reshape(shape), weight, 0.0)).to(TORCH[dtype])


def packed(form: str, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    dtype = next(name for name, kind in TORCH.items() if kind == weight.dtype)
    bits = weight.view(torch.uint16).numpy() if dtype != "F32" else weight.numpy()
    if form == "bitmap":
        form = f"bitmap {np.count_nonzero(bits)}"
    rows, cols = weight.shape
    how = PackedWeight(form, dtype, (rows, cols))
    parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
    linear = PackedLinear(how, parameter, "float32").eval()
    for part, stored, _ in how.layout:
        values = torch.from_numpy(how.pack(bits)[part])
        values = values if stored == "U8" else values.view(TORCH[stored])
        setattr(linear, part, nn.Parameter(values, requires_grad=False))
    return linear


def relative(found: Tensor, expected: Tensor) -> float:
    norm = float(expected.norm())
    return float((found.double() - expected).norm()) / norm if norm else float(found.abs().max())


@settings(max_examples=60)
@given(
    st.sampled_from(FORMATS), st.sampled_from(list(TORCH)), st.integers(1, 70),
    st.sampled_from([16, 48, 64, 256, 272, 592]), st.sampled_from([0, 1, 2, 3, 4, 5, 9, 33]),
    st.booleans(), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_products_are_those_of_the_unpacked_weight(form, dtype, rows, cols, tokens, biased, seed):
    weight = dense_weight(form, dtype, (rows, cols), seed)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(rows, generator=generator) if biased else None
    linear = packed(form, weight, bias)
    x = torch.randn(tokens, cols, generator=generator)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = linear(x)
    assert found.shape == (tokens, rows)
    assert found.dtype == torch.float32
    # No term goes through more roundings than there are columns; where signs are summed before they
    # are scaled, the activations of free columns are terms too.
    largest = weight.double().abs().amax(1)
    terms = x.double().abs().sum(1, keepdim=True) * largest + (0 if bias is None else bias.abs())
    bound = cols * 2**-23 * terms
    assert torch.all((found.double() - expected).abs() <= bound)
    if form.startswith("signs") and tokens:
        linear.compute = "int8"
        # Rounding moves an activation by half a 127th of the token's largest.
        step = x.double().abs().amax(1, keepdim=True) / 254 * weight.double().abs().sum(1)
        assert torch.all((linear(x).double() - expected).abs() <= 1.001 * step + bound)


@pytest.mark.parametrize("form", FORMATS)
def test_threads_change_no_bit(form):
    linear = packed(form, dense_weight(form, "BF16", (300, 512), 3))
    for tokens in (1, 4, 33):
        x = np.random.default_rng(tokens).standard_normal((tokens, 512), np.float32)
        for mode in ("float32", "int8")[: 2 if form.startswith("signs") else 1]:
            products = [linear.matrix().linear(x, mode=mode, threads=n) for n in (1, 2, 5)]
            assert products[0].tobytes() == products[1].tobytes() == products[2].tobytes()


def test_modes_shapes_and_types_of_a_module():
    weight = dense_weight("signs 2:8", "BF16", (12, 64), 1)
    bias = torch.randn(12).bfloat16()
    linear = packed("signs 2:8", weight, bias)
    x = torch.randn(2, 3, 64).bfloat16()
    linear.compute = "exact"
    exact = linear(x)
    assert torch.equal(exact, nn.functional.linear(x, weight, bias))
    for mode in ("float32", "int8"):
        linear.compute = mode
        y = linear(x)
        assert y.shape == (2, 3, 12)
        assert y.dtype == torch.bfloat16
        assert relative(y, exact.double()) < 0.05
    transposed = torch.randn(64, 3).T
    linear.compute = "float32"
    assert torch.equal(linear(transposed), linear(transposed.contiguous()))


def test_the_parts_are_read_in_place_and_found_again_when_they_change():
    first, second = (dense_weight("bitmap", "F32", (9, 40), seed) for seed in (1, 2))
    kept = min(int((first != 0).sum()), int((second != 0).sum()))
    for weight in (first, second):  # as many values in both, in other places
        weight.view(-1)[weight.view(-1).nonzero().flatten()[kept:]] = 0.0
    linear, other = packed("bitmap", first), packed("bitmap", second)
    x = torch.randn(2, 40)
    before = linear.matrix()
    assert relative(linear(x), x.double() @ first.double().T) < 1e-5
    assert linear.matrix() is before
    linear.load_state_dict(other.state_dict())
    assert relative(linear(x), x.double() @ second.double().T) < 1e-5
    linear.set_parts({part: value.clone() for part, value in packed("bitmap", first).parts.items()})
    assert relative(linear(x), x.double() @ first.double().T) < 1e-5
    twin = copy.deepcopy(linear)
    assert torch.equal(twin(x), linear(x))


def test_many_threads_of_python_may_share_a_linear():
    linear = packed("keep-of 2:4", dense_weight("keep-of 2:4", "BF16", (200, 256), 5))
    x = np.random.default_rng(0).standard_normal((3, 256), np.float32)
    matrix = linear.matrix()
    expected = matrix.linear(x, threads=2).tobytes()
    found: list[bool] = []

    def work() -> None:
        found.extend(matrix.linear(x, threads=2).tobytes() == expected for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [True] * 80


def test_a_forked_child_starts_workers_of_its_own():
    linear = packed("signs 4:8", dense_weight("signs 4:8", "BF16", (200, 256), 5))
    x = np.random.default_rng(0).standard_normal((3, 256), np.float32)
    matrix = linear.matrix()
    expected = matrix.linear(x, threads=2).tobytes()
    child = os.fork()
    if child == 0:
        os._exit(0 if matrix.linear(x, threads=2).tobytes() == expected else 1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert ended[1] == 0


def test_set_compute_reaches_all_linears_or_none():
    model = nn.Sequential(
        packed("signs 8:8", dense_weight("signs 8:8", "BF16", (16, 16), 1)),
        packed("keep-of 2:4", dense_weight("keep-of 2:4", "BF16", (8, 16), 2)),
    )
    set_compute(model, "exact")
    assert [linear.compute for linear in model] == ["exact", "exact"]
    with pytest.raises(UsageError, match=r"compute int8: expected signs, found keep-of 2:4"):
        set_compute(model, "int8")
    assert [linear.compute for linear in model] == ["exact", "exact"]
    with pytest.raises(UsageError, match="expected one of float32, exact, int8, found 'f'"):
        set_compute(model, "f")
    with pytest.raises(UsageError, match="expected a model with packed linears"):
        set_compute(nn.Linear(2, 2), "exact")


def test_the_cost_of_int8_is_reported_linear_by_linear():
    weights = [dense_weight("signs 4:8", "F32", (64, 64), seed) for seed in (1, 2)]
    model = nn.Sequential(*(packed("signs 4:8", weight) for weight in weights), nn.Linear(64, 3))
    x = torch.randn(5, 64)
    errors = int8_errors(model, x)
    assert set(errors) == {"0", "1"}
    set_compute(model, "int8")
    dense = x.double() @ weights[0].double().T
    assert errors["0"] == pytest.approx(relative(model[0](x), dense), rel=1e-3)
    assert 1e-4 < errors["0"] < 0.05


@pytest.mark.parametrize("dtype", TORCH)
def test_two_planes_of_signs_are_added(dtype):
    forms = ("signs 8:8", "signs 2:8")
    planes = [packed(form, dense_weight(form, dtype, (70, 592), 4 + i))
              for i, form in enumerate(forms)]  # fmt: skip
    linear = PackedLinear(PackedWeight("residual 2:8", dtype, (70, 592)), None, "float32").eval()
    values = [value for plane in planes for value in plane.parts.values()]
    assert len(values) == len(linear.parts) == 5
    for part, value in zip(list(linear.parts), values, strict=True):
        setattr(linear, part, nn.Parameter(value.detach(), requires_grad=False))
    for tokens in (1, 4, 33):
        x = torch.randn(tokens, 592, generator=torch.Generator().manual_seed(tokens))
        linear.compute = "float32"
        assert torch.equal(linear(x), planes[0](x) + planes[1](x))
        # The unpacked weight is rounded to its type; these scales are at most 2 * 99 / 64.
        step = {"BF16": 2**-8, "F16": 2**-10, "F32": 2**-20}[dtype] * 3.1 * x.abs().sum(1)
        unpacked = x.double() @ linear.weight.double().T
        assert torch.all((linear(x).double() - unpacked).abs() <= step[:, None])
        linear.compute = "int8"
        assert 1e-4 < relative(linear(x), planes[0](x).double() + planes[1](x)) < 0.05
    assert set(int8_errors(nn.Sequential(linear), x)) == {"0"}


def test_what_does_not_fit_is_refused_by_name():
    weight = dense_weight("keep-of 2:4", "BF16", (8, 16), 1)
    linear = packed("keep-of 2:4", weight)
    with pytest.raises(ValueError, match="x: expected 16 columns, found 12"):
        linear(torch.randn(1, 12))
    with pytest.raises(ValueError, match="mode int8: only for weights that are packed as signs"):
        linear.matrix().linear(np.zeros((1, 16), np.float32), mode="int8")
    with pytest.raises(ValueError, match='mode "f16": expected float32 or int8'):
        linear.matrix().linear(np.zeros((1, 16), np.float32), mode="f16")
    with pytest.raises(ValueError, match="x: expected C-contiguous memory"):
        linear.matrix().linear(np.zeros((16, 2), np.float32).T)
    with pytest.raises(RspruneError, match="expected an input on cpu, found meta"):
        linear(torch.empty(1, 16, device="meta"))
    parts = {part: value.view(torch.uint8).numpy() for part, value in linear.parts.items()}
    with pytest.raises(ValueError, match="part mask: missing"):
        _core.PackedMatrix({"values": parts["values"]}, "BF16", "keep-of 2:4", (8, 16))
    with pytest.raises(ValueError, match="bytes of the parts"):
        _core.PackedMatrix(parts, "BF16", "keep-of 2:4", (8, 32))
    linear.mask.data.fill_(0xFF)  # more bits than values: an error, not a read beyond the end
    with pytest.raises(ValueError, match="expected as many bits as there are values"):
        linear(torch.randn(1, 16))
