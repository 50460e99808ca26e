"""Channel permutations: found where they exist, harmless to the function, worth it for groups."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import KINDS, ordinary, tensors_of, token_ids

from rsprune import Config, _core, compress, load_report
from rsprune.permute import Coupling, find_couplings
from rsprune.plan import prepare

OPTIONS: dict[str, Any] = {"samples": 6, "seq_len": 32, "heldout": 0.34, "threads": 1}
GATED = Coupling(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", 64, 1)
HEADS = {"mistral": 16, "qwen3": 16, "gemma2": 16, "gemma3": 16, "qwen3_moe": 16}
FOUND = {
    kind: [Coupling(("self_attn.v_proj",), "self_attn.o_proj", HEADS.get(kind, 8), 2), GATED]
    for kind in KINDS
}
OPT = [
    Coupling(("self_attn.v_proj",), "self_attn.out_proj", 8, 1),
    Coupling(("fc1",), "fc2", 64, 1),
]
FOUND |= {
    "opt": OPT,
    "opt_projected": OPT,
    "gpt_neox": [Coupling(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", 64, 1)],
    "phi3": [Coupling(("mlp.gate_up_proj",), "mlp.down_proj", 64, 1)],
}
# Those of experts are known without a trial.
FOUND |= {kind: FOUND[kind][:1] for kind in ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")}


@pytest.mark.parametrize("kind", KINDS)
def test_couplings_are_found_by_trial(kind: str, tiny: Callable[..., Path]) -> None:
    prepared = prepare(tiny(kind), Config(pattern="2:4", **OPTIONS), None)
    prepared.skeleton.load_layer(0)
    sample = torch.randn(1, 32, prepared.skeleton.channels)
    found = find_couplings(
        prepared.skeleton.layers[0], prepared.opening.structures[0],
        prepared.stream.kwargs(0), sample,
    )  # fmt: skip
    assert found == FOUND[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_permutation_changes_no_logit(
    kind: str,
    tiny: Callable[..., Path],
    documents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything is kept (4:4), so only the order of the channels differs from the input."""
    generator = np.random.default_rng(0)

    def shuffled(operator: Any, *, segment: int, repeats: int, threads: int) -> Any:
        channels = operator.weight.shape[1] // repeats
        starts = range(0, channels, segment)
        return np.concatenate([start + generator.permutation(segment) for start in starts])

    monkeypatch.setattr(_core, "group_channels", shuffled)
    config = Config(
        method="magnitude", pattern="4:4", permute=True, calibration=str(documents), **OPTIONS
    )
    model = tiny(kind)
    compress(model, tmp_path / "out", config)
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    consumers = {coupling.consumer for coupling in FOUND[kind]}
    assert all(any(f"{c}.weight" in name for name in moved) for c in consumers)
    if any(".experts." in name for name in before):
        assert any(".experts." in name for name in moved)
    ids = token_ids(2, 16)
    expected = ordinary(model)(ids).logits
    found = ordinary(tmp_path / "out")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_better_order_lowers_the_error(tiny_llama: Path, documents: Path, tmp_path: Path) -> None:
    errors = {}
    for permute in (False, True):
        out = tmp_path / str(permute)
        config = Config(
            method="wanda", pattern="2:4", permute=permute, calibration=str(documents), **OPTIONS
        )
        compress(tiny_llama, out, config)
        tensors = load_report(out).tensors
        errors[permute] = sum(t["error"] for t in tensors if "down_proj" in t["name"])
    assert errors[True] < 0.97 * errors[False]


def test_ratios_have_no_groups(tiny_llama: Path, documents: Path, tmp_path: Path) -> None:
    outputs = []
    for permute in (False, True):
        out = tmp_path / str(permute)
        config = Config(
            method="wanda", pattern="50%", permute=permute, calibration=str(documents), **OPTIONS
        )
        compress(tiny_llama, out, config)
        outputs.append(tensors_of(out))
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
