"""Estimates: work counted from shapes, divided by speeds."""

import math
from pathlib import Path
from typing import Any

import pytest

from rsprune.config import Config
from rsprune.estimate import Speeds, measure_speeds, stages, total
from rsprune.methods import get, names, removes_layers
from rsprune.plan import prepare

SIZE: dict[str, Any] = {"samples": 4, "seq_len": 32, "pattern": "2:4"}


def seconds(model: Path, **options: Any) -> dict[str, float]:
    config = Config(**{**SIZE, **options})
    found = stages(prepare(model, config, None), config, Speeds(1e9, 1e9))
    assert math.isclose(total(found).seconds, sum(stage.seconds for stage in found))
    return {stage.name: stage.seconds for stage in found}


def test_twice_the_windows_take_twice_the_passes(tiny_llama: Path) -> None:
    once, twice = seconds(tiny_llama), seconds(tiny_llama, samples=8)
    for stage in ("calibrate", "propagate"):
        assert twice[stage] == pytest.approx(2 * once[stage])
    assert twice["solve"] == once["solve"] > 0


def test_a_forward_pass_is_two_operations_a_weight_and_token(tiny_llama: Path) -> None:
    weights = 32 * (32 + 16 + 16 + 32 + 3 * 64) + 2 * 32  # grouped heads, norms
    window = 2 * weights * 32 + 2 * 32**2 * 32
    assert seconds(tiny_llama)["propagate"] == pytest.approx(4 * window * 3 / 1e9)


def test_tuning_and_budgets_are_stages_of_their_own(tiny_llama: Path) -> None:
    assert "tune, at most" in seconds(tiny_llama, tune_block=True)
    assert "allocate" in seconds(tiny_llama, pattern="70%", allocate=True)
    assert seconds(tiny_llama, tune_block=True, tune_steps=64)["tune, at most"] == pytest.approx(
        seconds(tiny_llama, tune_block=True, tune_steps=128)["tune, at most"] / 2
    )


def test_every_method_says_what_it_costs() -> None:
    costs = {name: get(name).products(Config()) for name in names() if not removes_layers(name)}
    assert costs["wanda"] < costs["sparsegpt"] < costs["admm"] < costs["fista-plus"]


def test_speeds_are_measured() -> None:
    speeds = measure_speeds(1)
    assert speeds.forward > 1e7
    assert speeds.solver > 1e7
