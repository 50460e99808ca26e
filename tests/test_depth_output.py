"""What depth pruning writes: ordinary folders that plain transformers loads, of all classes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import KINDS, LAYERS, ordinary, tensors_of, token_ids

from rsprune.config import Config
from rsprune.depth.cut import _cut, cut_config
from rsprune.depth.plan import Opened, read_config_text
from rsprune.errors import UsageError
from rsprune.mixture import interleaved, load_corpora
from rsprune.report import load_report
from rsprune.run import compress
from rsprune.skeleton import load_tokenizer
from rsprune.verify import verify

OPTIONS: dict[str, Any] = {
    "method": "random", "remove": "1", "protect": "0,1", "texts": 3, "text_tokens": 16,
    "samples": 4, "seq_len": 24, "heldout": 0.25, "threads": 1,
}  # fmt: skip

PLAIN_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.partition(".")[0] == "rsprune" for name in sys.modules)
torch.manual_seed(0)
for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")), info
    AutoTokenizer.from_pretrained(folder)
    ids = torch.load(out)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        cached = model.generate(ids[:1], use_cache=True, **options)
        again = model.generate(ids[:1], use_cache=False, **options)
        logits = model(ids, use_cache=False).logits
    torch.save({"logits": logits, "cached": cached, "again": again}, out)
"""


@pytest.fixture(scope="module")
def outputs(
    tiny: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path, dict[str, torch.Tensor]]]:
    """Kind -> (dense folder, folder without a layer, what a process without rsprune found)."""
    root, made, words = tmp_path_factory.mktemp("depth"), {}, []
    for kind in KINDS:
        dense, out = tiny(kind), root / kind
        compress(dense, out, Config.create(calibration=str(text), fold=False, **OPTIONS))
        torch.save(token_ids(2, 20), root / f"{kind}.pt")
        words += [str(out), str(root / f"{kind}.pt")]
        made[kind] = (dense, out)
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", PLAIN_PROCESS, *words], check=True, env=environment)
    return {kind: (*made[kind], torch.load(root / f"{kind}.pt")) for kind in made}


def removed_of(out: Path) -> int:
    lines = [json.loads(line) for line in (out / "rsprune-report.jsonl").read_text().splitlines()]
    (removal,) = (line for line in lines if line["kind"] == "removal")
    return int(removal["removed"])


def skipping(model: Any, layer: int) -> Any:
    """The model with a decoder layer that hands its input through."""

    def hand_through(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    assert len(layers) == LAYERS
    layers[layer].register_forward_hook(hand_through, with_kwargs=True)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dense_model_without_the_layer(kind: str, outputs: Any):
    dense, out, found = outputs[kind]
    removed = removed_of(out)
    ids = token_ids(2, 20)
    with torch.no_grad():
        whole = ordinary(dense)(ids).logits
        expected = skipping(ordinary(dense), removed)(ids).logits
    assert not torch.allclose(whole, expected, atol=1e-2)  # the layer did something
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_is_generation_without(kind: str, outputs: Any):
    _, _, found = outputs[kind]
    assert torch.equal(found["cached"], found["again"])
    assert found["cached"].shape[1] == 26


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_whole(kind: str, outputs: Any):
    dense, out, _ = outputs[kind]
    assert verify(out) == []
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == LAYERS - 1
    if "layer_types" in config:
        assert len(config["layer_types"]) == LAYERS - 1
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{LAYERS:05d}.safetensors" for n in range(1, LAYERS + 1)]
    before, after = tensors_of(dense), tensors_of(out)
    assert sum(t.nbytes for t in after.values()) < sum(t.nbytes for t in before.values())
    assert len(after) < len(before)
    card = (out / "README.md").read_text()
    assert "decoder layers removed" in card
    assert "random" in card


def test_tied_embeddings_stay_tied(outputs: Any):
    _, out, _ = outputs["llama_tied"]
    assert "lm_head.weight" not in tensors_of(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"]


def test_kinds_of_lists_are_cut_each_in_its_way():
    content = {
        "num_hidden_layers": 4,
        "eos_token_id": [1, 2, 3, 4],
        "no_rope_layers": [1, 0, 1, 0],
        "mlp_only_layers": [1, 3],
        "first_k_dense_replace": 2,
        "rope_scaling": {"short_factor": [1.0, 2.0, 3.0, 4.0]},
        "text_config": {"num_hidden_layers": 4, "sliding_windows": [1, 2, 3, 4]},
    }
    lists = {"layer_types": ["a", "b", "c", "d"]}
    cut = _cut(content, [0, 2, 3], 4, lists)
    assert cut == {
        "num_hidden_layers": 3,
        "eos_token_id": [1, 2, 3, 4],
        "no_rope_layers": [1, 1, 0],
        "mlp_only_layers": [2],
        "first_k_dense_replace": 1,
        "rope_scaling": {"short_factor": [1.0, 2.0, 3.0, 4.0]},
        "text_config": {
            "num_hidden_layers": 3,
            "sliding_windows": [1, 3, 4],
            "layer_types": ["a", "c", "d"],
        },
        "layer_types": ["a", "c", "d"],
    }


def test_layers_that_are_made_by_their_numbers_are_refused(tiny: Callable[..., Path]):
    opened = Opened.of(tiny("qwen3_moe"), Config.create(**OPTIONS), 16)
    content = read_config_text(tiny("qwen3_moe"))
    assert content["mlp_only_layers"] == [1]
    with pytest.raises(UsageError, match=r"layer 1 must be what layer 2 was, expected mlp\.ex"):
        cut_config({**content, "mlp_only_layers": [1, 2]}, opened.skeleton, [1, 2])


UNFOLDED = ("gemma2", "gemma3", "opt_projected", "mixtral", "qwen3_moe", "qwen2_moe", "olmoe")
"""Kinds whose first layer does not end in a sum with a linear's output."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_fold_does_what_the_report_says_in_every_architecture(
    kind: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
):
    dense, out = tiny(kind), tmp_path / "out"
    options = {**OPTIONS, "method": "given", "remove": "1", "samples": 24, "seq_len": 32}
    compress(dense, out, Config.create(calibration=str(text), **options))
    (fold,) = (line["fold"] for line in load_report(out).layers if "fold" in line)
    windows = interleaved(load_corpora([str(text)]), load_tokenizer(dense), samples=24, seq_len=32,
                          seed=0, heldout=0.25).heldout  # fmt: skip

    def behind(folder: Path, layer: int) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def look(module: Any, args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        model = ordinary(folder)
        layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        layers[layer].register_forward_hook(look)
        with torch.no_grad():
            model(windows, use_cache=False)
        return seen[0].double()

    wanted, found = behind(dense, 1), behind(out, 0)
    error = float((found - wanted).square().sum() / wanted.square().sum())
    assert ("skipped" in fold) == (kind in UNFOLDED)
    assert error == pytest.approx(fold["before" if kind in UNFOLDED else "after"][1], rel=2e-3)
