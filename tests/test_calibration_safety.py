"""Calibration that cannot be trusted is located, refused or reported: no silent fallback."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import OPTIONS

from rsprune import Config, compress, load_report
from rsprune.driver import make_plan
from rsprune.errors import RspruneError, UsageError
from rsprune.progress import NullProgress

UP = "model.layers.1.mlp.up_proj.weight"


def changed(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a one-file model with other weights."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("method", ["wanda", "fista"])
def test_activations_that_overflow_are_located(
    method: str, tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    def overflow(weights: dict[str, torch.Tensor]) -> None:
        weights[UP] = torch.full_like(weights[UP], 3e38)  # finite, and allowed as a weight

    model = changed(tiny_llama, tmp_path / "model", overflow)
    config = Config(method=method, calibration=str(documents), **OPTIONS)
    message = r"layer 1, inputs of mlp\.down_proj, window 0: .*non-finite value at flat index \d+"
    if method == "fista":  # comes to the operator itself first: its output is not finite
        message = r"layers\.1\.mlp\.up_proj\.weight: squared output error: non-finite"
    with pytest.raises(RspruneError, match=message):
        compress(model, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "fista", "admm", "best"])
def test_dead_channels_are_in_the_report_and_said(
    method: str, tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    def kill(weights: dict[str, torch.Tensor]) -> None:
        weights[UP][:5] = 0

    model = changed(tiny_llama, tmp_path / "model", kill)
    notes: list[str] = []
    config = Config(method=method, calibration=str(documents), **OPTIONS)
    compress(model, tmp_path / "out", config, progress=Notes(notes))
    dead = {t["name"]: t["dead_channels"] for t in load_report(tmp_path / "out").tensors}
    name = UP.replace("up_proj", "down_proj")
    assert {key: value for key, value in dead.items() if value} == {name: 5}
    assert [n for n in notes if f"{name}: 5 of 64 input channels" in n]
    stored = load_file(next((tmp_path / "out").glob("model-00003-*")))[name]
    assert torch.isfinite(stored).all()


def test_a_gram_without_a_factor_is_refused_by_name(
    tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    options = {**OPTIONS, "samples": 1, "seq_len": 16, "heldout": 0.0}  # 16 tokens, 32 channels
    config = Config(method="sparsegpt", damping=0.0, calibration=str(documents), **options)
    message = (
        r"model\.layers\.0\.self_attn\.q_proj\.weight: the Gram matrix \(32 x 32\) is not positive "
        r"definite at pivot \d+ with damping 0: use more calibration tokens or a larger damping"
    )
    with pytest.raises(RspruneError, match=message):
        compress(tiny_llama, tmp_path / "out", config)


def test_too_few_tokens_are_warned_of_by_name(tiny_llama: Path, documents: Path) -> None:
    options = {**OPTIONS, "samples": 2, "heldout": 0.0}
    plan = make_plan(tiny_llama, Config(method="wanda", calibration=str(documents), **options))
    assert any("down_proj.weight: 64 calibration tokens are few for 64" in w for w in plan.warnings)


def test_a_text_shorter_than_asked_is_refused_before_the_run(
    tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("twenty words of text. " * 4)
    config = Config(method="wanda", calibration=str(tmp_path / "short.txt"), **OPTIONS)
    with pytest.raises(UsageError, match=r"192 tokens"):
        compress(tiny_llama, tmp_path / "out", config)
    assert not list(tmp_path.glob("out*"))


class Notes(NullProgress):
    """Keeps what a run says."""

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes

    def note(self, message: str) -> None:
        self._notes.append(message)
