"""Options without effect are said; those with one, and the defaults, are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rsprune import Config, methods
from rsprune.driver import make_plan
from rsprune.unused import METHODS, unused_options


def said(**options: Any) -> list[str]:
    config = Config(**options)
    return list(unused_options(config, methods.inputs_of(methods.get(config.method), config)))


CASES: list[tuple[dict[str, Any], str]] = [
    (
        {"method": "wanda", "damping": 0.1},
        "damping is read by sparsegpt and admm and fista",
    ),
    ({"method": "sparsegpt", "budget": 9}, "budget is read by best, not by sparsegpt"),
    ({"pattern": "50%", "permute": True}, "permute changes nothing for a ratio such as 50%"),
    ({"scope": "row"}, "scope is for ratios, not for 2:4"),
    ({"target": "own", "correction": 0.5}, "correction is for target dense"),
    ({"tune_steps": 5}, "tune_steps needs tune_block"),
    ({"calibration_field": "text"}, "calibration_field needs a calibration file"),
]


@pytest.mark.parametrize(("options", "text"), CASES)
def test_an_option_without_effect_is_said(options: dict[str, Any], text: str):
    assert [line for line in said(**options) if text in line]


USED: list[dict[str, Any]] = [
    {},
    {"method": "admm", "damping": 0.1, "rho_schedule": "published"},
    {"method": "best", "budget": 9, "permute": True},
    {"method": "best", "pattern": "50%", "scope": "row", "permute": False},
    {"method": "fista", "xi": 0.2, "correction": 0.5, "warm_start": "sparsegpt"},
    {"tune_block": True, "tune_steps": 5, "tune_rate": 0.1, "tune_batch": 1},
]


@pytest.mark.parametrize("options", USED)
def test_options_with_an_effect_are_not(options: dict[str, Any]):
    assert said(**options) == []


def test_every_method_and_option_exists():
    assert set(METHODS) <= set(Config.model_fields)
    for names in METHODS.values():
        for name in names:
            assert methods.get(name).name == name


def test_the_plan_says_it(tiny: Callable[..., Path]):
    plan = make_plan(tiny("llama"), Config(method="wanda", samples=8, seq_len=32, budget=9))
    assert any("option budget is read by best" in warning for warning in plan.warnings)
