"""Packed folders in transformers: load, generate, save, and refuse what would be random."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compat_check
import pytest
import torch
from packed_models import Pair, binarized, pair_of
from safetensors.torch import load_file, save_file
from tiny_models import token_ids
from transformers import AutoModel, AutoModelForCausalLM

import rsprune
from rsprune.errors import UsageError
from rsprune.packed_linear import PackedLinear

CASES = {
    "tied": ("llama_tied", "2:4", "magnitude"),
    "bitmap": ("qwen2", "50%", "magnitude"),
    "bias": ("opt", "4:8", "magnitude"),
    "signs": ("llama", "3:4", "magnitude"),
}
DOWN = "model.layers.1.mlp.down_proj"
ORDERS = {
    "rsprune first": "import rsprune, transformers",
    "transformers first": "import transformers, transformers.quantizers.auto; import rsprune",
    "lazily": "import transformers; import rsprune",
}


@pytest.fixture(scope="module")
def pairs(
    tiny: Callable[..., Path], documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def of(case: str) -> Pair:
        if case not in made:
            kind, pattern, method = CASES[case]
            folder, model = tmp_path_factory.mktemp(case), tiny(kind)
            if case == "signs":
                model = binarized(model, folder / "model", pattern, shutil.copyfile)
            made[case] = pair_of(model, folder, documents, pattern, method)
        return made[case]

    return of


@pytest.fixture
def packed(pairs: Callable[[str], Pair]) -> Any:
    return AutoModelForCausalLM.from_pretrained(pairs("tied").packed, dtype=torch.bfloat16)


@pytest.mark.parametrize("case", CASES)
def test_loads_generates_and_saves(case: str, pairs: Callable[[str], Pair]) -> None:
    pair = pairs(case)
    compat_check.main(pair.packed, pair.dense)  # what the clean environments run


def test_packed_experts_load(tiny: Callable[..., Path], documents: Path, tmp_path: Path) -> None:
    pair = pair_of(tiny("qwen3_moe"), tmp_path, documents, "2:4", "magnitude")
    packed, dense = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (pair.packed, pair.dense)
    )
    names = [name for name, module in packed.named_modules() if isinstance(module, PackedLinear)]
    assert any(".experts." in name for name in names)
    ids = token_ids(2, 16)
    with torch.no_grad():  # experts are summed in another order than fused ones
        assert torch.allclose(packed(ids).logits, dense(ids).logits, atol=1e-4)
    packed.save_pretrained(tmp_path / "saved")
    compat_check.same_tensors(pair.packed, tmp_path / "saved")


@pytest.mark.parametrize(
    ("kind_of_model", "prefixed"),
    [("llama_tied", False), ("llama_tied", True), ("mixtral", True)],  # whose experts are renamed
)
def test_what_is_saved_under_other_names_loads_again(
    kind_of_model: str, prefixed: bool, tiny: Callable[..., Path], documents: Path, tmp_path: Path
) -> None:
    """A causal model from a checkpoint of the base model, and the base model of a causal one."""
    source, prefix = shutil.copytree(tiny(kind_of_model), tmp_path / "source"), "model."
    if not prefixed:
        (file,) = source.glob("*.safetensors")
        tensors = {n.removeprefix(prefix): t.clone() for n, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    pair = pair_of(source, tmp_path, documents, "2:4", "magnitude")
    kind: Any = AutoModel if prefixed else AutoModelForCausalLM
    model = kind.from_pretrained(pair.packed, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = token_ids(2, 16)
    with torch.no_grad():
        assert torch.equal(again(ids)[0], model(ids)[0])


@pytest.mark.parametrize("order", ORDERS)
def test_either_may_be_imported_first(order: str, pairs: Callable[[str], Pair]) -> None:
    code = (
        f"{ORDERS[order]}\nimport sys\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert AUTO_QUANTIZER_MAPPING['rsprune'].__module__ == 'rsprune.hf'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_importing_costs_nothing() -> None:
    code = "import rsprune, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
    assert time.perf_counter() - started < 5  # and not the time that torch takes on a busy machine


def test_parts_keep_their_types(packed: Any) -> None:
    linear = packed.get_submodule(DOWN)
    assert isinstance(linear, PackedLinear)
    stored = {part: value.clone() for part, value in linear.parts.items()}
    assert {value.dtype for value in stored.values()} == {torch.bfloat16, torch.uint8}
    assert not any(value.requires_grad for value in linear.parts.values())
    linear.to(torch.float32)
    for part, value in linear.parts.items():
        assert value.dtype == stored[part].dtype
        assert torch.equal(value, stored[part])
    assert linear.weight.dtype == torch.bfloat16
    assert linear.weight.shape == (linear.out_features, linear.in_features)
    assert "keep-of 2:4" in repr(linear)


def test_how_it_multiplies_is_saved(packed: Any, tmp_path: Path) -> None:
    assert packed.config.quantization_config.compute == "float32"
    rsprune.set_compute(packed, "exact")
    packed.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.get_submodule(DOWN).compute == "exact"


def test_gradients_are_refused(packed: Any) -> None:
    ids = token_ids(1, 4)
    logits = packed(ids).logits  # grad mode, as a user forgets to leave it
    with pytest.raises(RuntimeError, match=r"no gradients: run under torch\.no_grad"):
        logits.sum().backward()
    packed.train()
    with pytest.raises(RuntimeError, match="no gradients"):
        packed(ids)
    with torch.no_grad():
        assert torch.equal(packed.eval()(ids).logits, logits)


def test_a_dequantized_model_is_an_ordinary_one(
    pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pairs("bias")
    model = rsprune.load(pair.packed, dequantize=True)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    model.train()(token_ids(1, 4)).logits.sum().backward()
    model.save_pretrained(tmp_path)
    assert "rsprune" not in (tmp_path / "config.json").read_text()
    assert type(rsprune.load(pair.dense, dequantize=True)) is type(model)


def test_a_gap_in_the_files_is_refused(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    folder = shutil.copytree(pairs("signs").packed, tmp_path / "broken")

    def load() -> None:
        AutoModelForCausalLM.from_pretrained(folder)

    path = folder / "config.json"
    text = path.read_text()

    def change(edit: Callable[[dict[str, Any]], object]) -> None:
        content = json.loads(text)
        edit(content["quantization_config"])
        path.write_text(json.dumps(content))

    change(lambda s: s.update(version=9))
    with pytest.raises(UsageError, match="expected version 1, found 9; a newer rsprune"):
        load()
    change(lambda s: (s["linears"].update(x="signs 3:4"), s["dense"].update(x=["BF16", [4, 4]])))
    with pytest.raises(UsageError, match=r"x\.positions: expected for signs 3:4"):
        load()
    change(lambda s: s["dense"].update({DOWN: ["BF16", [64, 32]]}))
    with pytest.raises(UsageError, match=rf"{DOWN}.positions: expected U8 \[64"):
        load()
    change(lambda s: s.update(compute="fast"))
    with pytest.raises(UsageError, match="compute: expected one of float32"):
        load()
    path.write_text(text)
    load()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][f"{DOWN}.scales"]
    tensors = load_file(shard)
    del tensors[f"{DOWN}.scales"]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(UsageError, match=f"{DOWN}.scales: expected for signs 3:4"):
        load()


def test_a_linear_of_another_model_is_refused(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    folder = shutil.copytree(pairs("signs").packed, tmp_path / "other")
    content = json.loads((folder / "config.json").read_text())
    content["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(content))
    message = "packed as config.json says, but LlamaForCausalLM has no such linear"
    with pytest.raises(UsageError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    content |= {"num_hidden_layers": 3, "intermediate_size": 128}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        UsageError, match=r"down_proj: expected a linear of \[32, 64\] as config.json"
    ):
        AutoModelForCausalLM.from_pretrained(folder)
