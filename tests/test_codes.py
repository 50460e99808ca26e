"""Which code every operator gets, whole runs of the binarizing methods, and what they refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tensors_of

from rsprune import _core
from rsprune.codes import Choice, coarse, knapsack, redundancy, with_mean_losses
from rsprune.config import Config
from rsprune.driver import make_plan
from rsprune.errors import RspruneError, UsageError
from rsprune.plan import prepare
from rsprune.progress import NullProgress
from rsprune.report import load_report
from rsprune.run import compress
from rsprune.verify import verify

OPTIONS: dict[str, Any] = {"samples": 6, "seq_len": 32, "heldout": 0.34, "threads": 1}
METHODS: dict[str, dict[str, Any]] = {
    "pbs2p": {"pattern": "6:8"},
    "pbs2p-exact": {"bits": 1.7},
    "billm": {},
    "arb": {},
    "gptq": {"bits": 3},
}


def plane_of(record: dict[str, Any]) -> str:
    """What the second plane of signs adds to a code's name."""
    return f" + {record['residual']}" if "residual" in record else ""


def run(model: Path, out: Path, documents: Path, **options: Any) -> Path:
    compress(model, out, Config.create(calibration=str(documents), **OPTIONS, **options))
    return out


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_run(
    method: str, tiny: Callable[..., Path], documents: Path, tmp_path: Path
) -> None:
    out = run(tiny("llama"), tmp_path / "out", documents, method=method, **METHODS[method])
    report = load_report(out)
    assert verify(out) == []
    assert {record["method"] for record in report.tensors} == {method}
    assert all(record["packed_bits"] > record["nominal_bits"] > 0 for record in report.tensors)
    assert all(0 < record["error"] < 1.5 for record in report.tensors)
    before, after = tensors_of(tiny("llama")), tensors_of(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {record["name"] for record in report.tensors}


def test_true_bits_stay_within_the_budget(
    tiny: Callable[..., Path], documents: Path, tmp_path: Path
) -> None:
    for bits in (1.55, 1.9, 2.3):
        out = run(tiny("llama"), tmp_path / f"{bits}", documents, method="pbs2p-exact", bits=bits)
        report = load_report(out)
        sizes = [record["shape"][0] * record["shape"][1] for record in report.tensors]
        found = [record["packed_bits"] for record in report.tensors]
        total = sum(b * s for b, s in zip(found, sizes, strict=True)) / sum(sizes)
        assert bits - 0.1 < total <= bits
        assert report.allocation is not None
        assert report.allocation["true_bits"] == pytest.approx(total)
        codes = {r["name"]: r["pattern"] + plane_of(r) for r in report.tensors}
        assert report.allocation["codes"] == codes
        assert bits < 2.2 or any("+" in code for code in codes.values())


def test_a_gram_without_a_factor_is_refused_by_name(
    tiny: Callable[..., Path], documents: Path, tmp_path: Path
) -> None:
    few = {**OPTIONS, "samples": 1, "seq_len": 16, "heldout": 0.0}
    config = Config.create(
        calibration=str(documents), method="pbs2p-exact", bits=1.9, damping=0.0, **few
    )
    with pytest.raises(RspruneError, match=r"layers\.0\..*weight: the Gram matrix .* damping 0"):
        compress(tiny("llama"), tmp_path / "out", config)


def test_n_follows_what_a_layer_changes(
    tiny: Callable[..., Path], documents: Path, tmp_path: Path
) -> None:
    out = run(tiny("llama"), tmp_path / "out", documents, method="pbs2p", pattern="5:8")
    report = load_report(out)
    assert report.allocation is not None
    layers, found = report.allocation["layers"], report.allocation["redundancy"]
    assert sum(found) / len(found) == pytest.approx(1)
    assert sum(layers) / len(layers) <= 5
    assert sorted(layers) == [n for _, n in sorted(zip(found, layers, strict=True))]
    patterns = {(r["layer"], r["pattern"]) for r in report.tensors}
    assert patterns == {(layer, f"{n}:8") for layer, n in enumerate(layers)}


def test_redundancy_is_what_the_model_itself_says(
    tiny: Callable[..., Path], documents: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny("llama")
    windows = torch.randint(0, 250, (3, 16), generator=torch.Generator().manual_seed(0))
    prepared = prepare(folder, Config(samples=3, seq_len=16), None)
    found = redundancy(prepared, windows, 1, NullProgress())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, args, output: seen.append(
                1 - torch.cosine_similarity(
                    args[0], output if torch.is_tensor(output) else output[0], dim=-1
                ).mean()
            )
        )  # fmt: skip
    with torch.no_grad():
        model(windows)
    expected = torch.stack(seen) / torch.stack(seen).mean()
    assert found == pytest.approx(expected.tolist(), rel=1e-3)


def test_a_look_at_the_model_gives_memory_back_after_every_layer(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it memory grew by 6 MiB a layer of SmolLM2, beyond what was planned."""
    given: list[None] = []
    monkeypatch.setattr("rsprune.survey.give_freed_pages_back", lambda: given.append(None))
    prepared = prepare(tiny("llama"), Config(samples=3, seq_len=16), None)
    windows = torch.zeros((3, 16), dtype=torch.int64)
    redundancy(prepared, windows, 1, NullProgress())
    assert len(given) == len(prepared.skeleton.layers) > 1


importances = st.lists(st.floats(0.01, 4.0), min_size=1, max_size=12)


@given(importances, st.integers(1, 8), st.randoms(use_true_random=False))
def test_coarse_keeps_to_the_target(values: list[float], target: int, chooser: Any) -> None:
    mean = sum(values) / len(values)
    importance = [value / mean for value in values]
    weights = [chooser.randint(1, 50) for _ in values]
    layers = coarse(importance, weights, target)
    assert sum(n * w for n, w in zip(layers, weights, strict=True)) <= target * sum(weights)
    assert all(max(target - 2, 1) <= n <= min(target + 2, 8) for n in layers)
    order = sorted(range(len(layers)), key=lambda i: importance[i])
    assert [layers[i] for i in order] == sorted(layers)


def test_coarse_uses_its_room() -> None:
    assert coarse([0.4, 0.8, 1.2, 1.6], [1, 1, 1, 1], 5) == [3, 4, 6, 7]
    assert coarse([1.0, 1.0], [1, 1], 6) == [6, 6]
    assert len(set(coarse([0.4, 0.8, 1.2, 1.6], [13, 12, 11, 10], 5))) > 1
    skewed = [4.45, 1.86, *([0.59] * 7), *([0.75] * 7), *([0.94] * 8), *([1.11] * 5), 2.6]
    mean = sum(skewed) / len(skewed)
    found = coarse([value / mean for value in skewed], [100] * len(skewed), 6)
    assert len(set(found)) > 2
    assert 5.9 <= sum(found) / len(found) <= 6


def test_what_saw_no_token_counts_as_the_others_do() -> None:
    seen = [Choice("a", 0.2, 10.0), Choice("b", 0.1, 20.0)]
    more = [Choice("a", 0.4, 30.0), Choice("b", 0.3, 40.0)]
    blind = [Choice("a", 0.0, 1.0), Choice("b", 0.0, 2.0)]
    found = with_mean_losses({"x": seen, "y": more, "z": blind}, ["z"])
    assert found["x"] == seen
    assert [c.loss for c in found["z"]] == pytest.approx([0.3, 0.2])
    assert [c.bits for c in found["z"]] == [1.0, 2.0]
    assert with_mean_losses({"z": blind}, ["z"]) == {"z": blind}


choices = st.lists(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 20)), min_size=1, max_size=3),
    min_size=1, max_size=5,
)  # fmt: skip


@given(choices, st.floats(0, 1))
def test_the_knapsack_is_near_the_optimum(raw: list[list[tuple[float, int]]], share: float) -> None:
    operators = [[Choice(str(k), loss, bits) for k, (loss, bits) in enumerate(o)] for o in raw]
    least = sum(min(c.bits for c in o) for o in operators)
    most = sum(max(c.bits for c in o) for o in operators)
    budget = int(least + share * (most - least))
    found = knapsack(operators, budget)
    assert sum(c.bits for c in found) <= budget
    every = (p for p in itertools.product(*operators) if sum(c.bits for c in p) <= budget)
    optimum = min(sum(c.loss for c in p) for p in every)
    # A Lagrangian misses the optimum by no more than one operator's change.
    widest = max(max(c.loss for c in o) - min(c.loss for c in o) for o in operators)
    assert optimum - 1e-9 <= sum(c.loss for c in found) <= optimum + widest + 1e-9
    if share == 1:
        assert sum(c.loss for c in found) == pytest.approx(optimum)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pattern not of 8": ({"method": "pbs2p"}, r"pbs2p expects n:8 such as 6:8, found 2:4"),
    "ratio": ({"method": "pbs2p", "pattern": "50%"}, "pbs2p expects n:8 .* found 50%"),
    "none kept": ({"method": "pbs2p", "pattern": "0:8"}, "pbs2p expects n:8 .* found 0:8"),
    "bits of a pattern": ({"method": "pbs2p", "pattern": "6:8", "bits": 1.0}, "option bits: pbs2p"),
    "a width that is none": ({"method": "gptq", "bits": 2.5}, "gptq expects 2, 3 or 4, found 2.5"),
    "pattern beside bits": ({"method": "gptq", "pattern": "4:8"}, "option pattern: gptq does not"),
    "pattern of a code": ({"method": "billm", "pattern": "6:8"}, "option pattern: billm does not"),
    "bits of arb": ({"method": "arb", "bits": 1.0}, "option bits: arb does not take it, found 1"),
    "pattern of no code": (
        {"method": "pbs2p-exact", "pattern": "1:4"},
        "pbs2p-exact expects one of 2:8, .* found 1:4",
    ),
    "bits beside a pattern for all": (
        {"method": "pbs2p-exact", "pattern": "8:8", "bits": 1.0},
        "option bits: expected none beside",
    ),
    "too few bits": (
        {"method": "pbs2p-exact", "bits": 0.9},
        r"pbs2p-exact expects at least 1\.4\d*, which the code 2:8 takes .* found 0.9",
    ),
    "refit": ({"method": "gptq", "refit": True}, "option refit: expected off beside gptq"),
    "search": ({"method": "arb", "search": True}, "option search: expected off beside arb"),
    "tuning": ({"method": "billm", "tune_block": True}, "option tune_block: expected off"),
    "budget": ({"method": "pbs2p-exact", "allocate": True}, "option allocate: expected off"),
    "order": (
        {"method": "pbs2p", "pattern": "6:8", "permute": True},
        "option permute: expected off beside pbs2p, whose weights are codes, found on",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tiny: Callable[..., Path]) -> None:
    options, message = REFUSED[name]
    with pytest.raises(UsageError, match=message):
        make_plan(tiny("llama"), Config.create(**OPTIONS, **options))


def test_more_bits_than_there_are_codes_for_is_said(tiny: Callable[..., Path]) -> None:
    config = Config.create(**OPTIONS, method="pbs2p-exact", bits=4.0)
    warnings = make_plan(tiny("llama"), config).warnings
    assert any("no code takes more than 2" in warning for warning in warnings)
    enough = make_plan(tiny("llama"), config.model_copy(update={"bits": 1.9})).warnings
    assert not any("option bits" in warning for warning in enough)


def test_columns_that_are_no_whole_groups() -> None:
    with pytest.raises(ValueError, match="divisible by 8, found 20"):
        _core.Pattern("8:8").check("weight", 20)
