"""Tuning of a layer to the dense one's output, and budgets over layers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import KINDS, LAYERS, tensors_of

from rsprune import Config, compress, load_report
from rsprune.allocate import Curve, allocate, bounds, exact_patterns, unit_of
from rsprune.errors import UsageError
from rsprune.plan import Operator
from rsprune.verify import verify

OPTIONS: dict[str, Any] = {"samples": 6, "seq_len": 32, "heldout": 0.34, "threads": 1}
TUNED: dict[str, Any] = {
    "method": "wanda", "pattern": "2:4", "tune_block": True, "tune_steps": 20, **OPTIONS,
}  # fmt: skip


def run(model: Path, out: Path, documents: Path, **options: Any) -> Path:
    compress(model, out, Config(calibration=str(documents), **options))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_tuning_lowers_the_held_out_error_of_every_layer(
    kind: str, tiny: Callable[..., Path], documents: Path, tmp_path: Path
) -> None:
    out = run(tiny(kind), tmp_path / "out", documents, **TUNED)
    tunings = [layer["tuning"] for layer in load_report(out).layers]
    assert len(tunings) == LAYERS
    assert all(t["after"] < 0.99 * t["before"] for t in tunings)
    assert all(t["steps"] > 0 for t in tunings)
    assert verify(out) == []


@pytest.mark.parametrize("propagate", ["layer", "model"])
@pytest.mark.parametrize("target", ["dense", "own"])
def test_masks_and_what_is_not_tuned_stay(
    propagate: str, target: str, tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    inputs = {"propagate": propagate, "target": target, "ignore": ["*k_proj*"]}
    out = run(tiny_llama, tmp_path / "out", documents, **TUNED, **inputs)
    before, after = tensors_of(tiny_llama), tensors_of(out)
    norms = [n for n in before if "layernorm" in n]
    assert any(not torch.equal(before[n], after[n]) for n in norms)
    for name, value in after.items():
        if "k_proj" in name or "embed" in name or "lm_head" in name:
            assert torch.equal(value, before[name])
        elif "proj" in name:
            zeros = (value.unflatten(1, (-1, 4)) == 0).sum(-1)
            assert (zeros >= 2).all()
            assert zeros.float().mean() < 2.1


def test_any_number_of_threads_gives_the_same_bits(
    tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    outputs = [
        tensors_of(run(tiny_llama, tmp_path / str(t), documents, **{**TUNED, "threads": t}))
        for t in (1, 2, 5)
    ]
    for name, value in outputs[0].items():
        assert all(torch.equal(value, other[name]) for other in outputs[1:]), name


def test_the_budget_is_met_and_flat_curves_pay_more() -> None:
    curves = {
        "a": Curve(-4.0, 3.0, 100), "b": Curve(-2.0, 3.0, 100), "c": Curve(-3.0, 3.0, 300)
    }  # fmt: skip
    shares = allocate(curves, 0.7)
    assert math.isclose(sum(curves[u].weights * shares[u] for u in curves) / 500, 0.7, abs_tol=1e-6)
    assert shares["a"] > shares["b"]
    low, high = bounds(0.7)
    assert all(low <= share <= high for share in shares.values())
    free = [u for u in curves if low + 1e-6 < shares[u] < high - 1e-6]
    assert len(free) > 1  # an interior optimum exists: there the slopes per weight agree
    slopes = [curves[u].slope * curves[u].error(shares[u]) / curves[u].weights for u in free]
    assert max(slopes) / min(slopes) < 1.0001


@given(
    st.floats(0.0, 0.998),
    st.lists(st.tuples(st.integers(1, 40), st.integers(8, 64), st.floats(-9, 0), st.floats(0.1, 9)),
             min_size=1, max_size=9),
)  # fmt: skip
def test_all_operators_together_have_the_zeros_that_were_asked_for(
    sparsity: float, rows: list[tuple[int, int, float, float]]
) -> None:
    operators = [
        Operator(f"{i}.weight", i // 2, f"linear{i}", m, 64 * n, "F32", 64)
        for i, (m, n, _, _) in enumerate(rows)
    ]
    curves = {
        unit_of(o): Curve(a, b, o.rows * o.columns)
        for o, (_, _, a, b) in zip(operators, rows, strict=True)
    }
    found = exact_patterns(operators, allocate(curves, sparsity), sparsity)
    zeros = [round(found[o.name].sparsity * o.rows * o.columns) for o in operators]
    total = sum(o.rows * o.columns for o in operators)
    assert sum(zeros) == round(sparsity * total)


def test_a_curve_goes_through_its_points() -> None:
    curve = Curve.fit([(s, 0.01 * math.exp(4 * s)) for s in (0.6, 0.7, 0.8)], 10)
    assert math.isclose(curve.slope, 4.0, rel_tol=1e-9)
    assert math.isclose(curve.error(0.7), 0.01 * math.exp(2.8), rel_tol=1e-9)


def test_the_whole_model_has_exactly_the_ratio(
    tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    options = {"method": "sparsegpt", "pattern": "70%", "allocate": True, **OPTIONS}
    report = load_report(run(tiny_llama, tmp_path / "out", documents, **options))
    assert report.allocation is not None
    assert report.summary is not None
    assert len(set(report.allocation["operators"].values())) > 1  # they do differ
    assert report.summary["zeros"] == round(0.7 * report.summary["weights"])
    assert verify(tmp_path / "out") == []


def test_groups_cannot_be_allocated(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"option allocate: expected a ratio .* found 2:4"):
        compress(tiny_llama, tmp_path / "out", Config(pattern="2:4", allocate=True, **OPTIONS))
    assert not (tmp_path / "out").exists()


def test_layers_without_operators_take_no_part_in_the_budget(
    tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    options = {"method": "wanda", "pattern": "70%", "allocate": True, **OPTIONS}
    out = run(tiny_llama, tmp_path / "out", documents, ignore=["*layers.0.*"], **options)
    report = load_report(out)
    assert report.allocation is not None
    assert report.summary is not None
    assert "0" not in report.allocation["layers"]
    assert report.summary["zeros"] == round(0.7 * report.summary["weights"])
    assert verify(out) == []
    with pytest.raises(UsageError, match="option scope: expected matrix beside allocate"):
        run(tiny_llama, tmp_path / "rows", documents, scope="row", **options)
