"""Folders with replaced layers: loaded, saved, gone on with, extended, and written out dense."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from replaced_models import OPTIONS, RUNS, blocks_of
from tiny_models import ordinary, tensors_of, token_ids

from rsprune import Config, compress
from rsprune.errors import UsageError
from rsprune.export import export_dense
from rsprune.flexi.train import Training, train
from rsprune.progress import NullProgress
from rsprune.replaced import Block, parse_blocks, read_blocks
from rsprune.verify import verify

Deep = Made = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _registered() -> None:
    import rsprune.hf  # noqa: F401 registers the loader


LOAD = """
import sys, torch
import rsprune
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.arange(20, 32)[None]
options = dict(max_new_tokens=8, do_sample=False, pad_token_id=257, eos_token_id=None)
cached = model.generate(ids, use_cache=True, **options)
assert torch.equal(cached, model.generate(ids, use_cache=False, **options)), cached
model.save_pretrained(sys.argv[2])
torch.save(model(ids).logits, sys.argv[2] + "/logits.pt")
"""


@pytest.mark.parametrize("name", ["default", "shared", "own", "faithful"])
def test_a_new_process_loads_generates_and_saves(name: str, replaced: Made, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    command = [sys.executable, "-c", LOAD, str(replaced(name)), str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "newly initialized" not in done.stderr
    logits = torch.load(saved / "logits.pt")
    again = ordinary(saved)
    assert torch.equal(again(torch.arange(20, 32)[None]).logits, logits)
    before, after = tensors_of(replaced(name)), tensors_of(saved)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].float(), after[n].float()) for n in before)


def test_shared_weights_are_in_memory_once(replaced: Made) -> None:
    out = replaced("shared")
    model = ordinary(out)
    for index, block in blocks_of(out).items():
        layers = model.model.layers
        ours, theirs = (layers[n].mlp.down_proj for n in (index, block["source"]))
        weight = ours._source[0].weight
        assert weight.data_ptr() == theirs.weight.data_ptr()
    stored = sum(t.numel() for t in tensors_of(out).values())
    assert sum(p.numel() for p in model.parameters()) == stored
    names = {name for name, _ in model.named_parameters()}
    assert names == set(tensors_of(out))


def test_folds_alone_are_an_ordinary_checkpoint(replaced: Made) -> None:
    code = LOAD.replace("import rsprune\n", "assert 'rsprune' not in sys.modules\n")
    out = replaced("fold")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    target = out.with_name("saved")
    command = [sys.executable, "-c", code, str(out), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


class _Stopping(NullProgress):
    """Ends a run at its n-th step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("steps", [2, 4, 5, 6])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    steps: int,
    deep: Deep,
    replaced: Made,
    documents: Path,
    tmp_path: Path,
) -> None:
    config = Config(calibration=str(documents), **{**OPTIONS, "replace": ("fold", "shared", "map")})
    whole, out = tmp_path / "whole", tmp_path / "out"
    compress(deep("llama"), whole, config)
    with pytest.raises(KeyboardInterrupt):
        compress(deep("llama"), out, config, progress=_Stopping(steps))
    assert not out.exists()
    compress(deep("llama"), out, config)
    for path in [*whole.glob("*.safetensors"), *whole.glob("*.json")]:
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_any_number_of_threads_gives_the_same_bits(
    deep: Deep,
    replaced: Made,
    documents: Path,
    tmp_path: Path,
) -> None:
    config = Config(calibration=str(documents), **{**OPTIONS, "threads": 3})
    compress(deep("llama"), tmp_path / "out", config)
    one, three = tensors_of(replaced("default")), tensors_of(tmp_path / "out")
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen3", "opt", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_extended_model_is_the_dense_one_bit_for_bit(
    kind: str,
    dtype: torch.dtype,
    deep: Deep,
    documents: Path,
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    options = {**OPTIONS, "remove": None, "extend": 2}
    compress(deep(kind), tmp_path / "out", Config(calibration=str(documents), **options))
    dense, longer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for folder in (deep(kind), tmp_path / "out")
    )
    assert longer.config.num_hidden_layers == dense.config.num_hidden_layers + 2
    ids = token_ids(2, 20)
    with torch.no_grad():
        assert torch.equal(longer(ids).logits, dense(ids).logits)
    longer(ids, labels=ids).loss.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in longer.named_parameters()
        if name.endswith((".gain", "lora_B.weight"))
    }
    assert gradients
    moving = [name for name, grad in gradients.items() if grad is not None and grad.any()]
    assert any(name.endswith(".gain") for name in moving)
    assert any(name.endswith("lora_B.weight") for name in moving)


def test_an_architecture_that_cannot_be_extended_is_refused(
    deep: Deep,
    documents: Path,
    tmp_path: Path,
) -> None:
    options = {**OPTIONS, "remove": None, "extend": 1}
    config = Config(calibration=str(documents), **options)
    with pytest.raises(UsageError, match="with nothing to add must hand its input through"):
        compress(deep("opt_projected"), tmp_path / "out", config)


@pytest.mark.parametrize("name", ["shared", "own", "svd"])
def test_dense_exports_compute_the_same(name: str, replaced: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_dense(replaced(name), out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert verify(out) == []
    ids = token_ids(2, 20)
    expected, found = ordinary(replaced(name))(ids).logits, ordinary(out)(ids).logits
    error = (found - expected).norm() / expected.norm()
    assert error < 0.03  # products are rounded to bfloat16
    names = {n for n in tensors_of(out) if "lora" in n or "gain" in n}
    assert names == set()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("map", "layer 1 has a linear map of the residual stream behind it"),
     ("faithful", "layer 2 has its output normalised as published")],
)  # fmt: skip
def test_what_no_ordinary_layer_computes_is_not_exported(
    name: str,
    expected: str,
    replaced: Made,
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=expected):
        export_dense(replaced(name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


BAD = [
    ([], "blocks: expected an object"),
    ({"9": {}}, "blocks: expected layers below 6, found '9'"),
    ({"x": {}}, "blocks: expected layers below 6, found 'x'"),
    ({"1": {"kind": 3}}, "blocks: layer 1 kind: Extra inputs"),
    ({"1": {"maps": [0]}}, "blocks: layer 1 : Value error, ranks: expected 1 to 65536"),
    ({"1": {"gains": ["a"]}}, "gains: are for layers with a source"),
    ({"1": {"source": 1}}, "layer 1: expected an ordinary layer as source, found 1"),
    ({"1": {"source": 7}}, "layer 1: expected an ordinary layer as source, found 7"),
    ({"1": {"source": 2}, "2": {"source": 3}}, "layer 1: expected an ordinary layer as source"),
    ({"1": {"source": 2}, "2": {"ranks": {"a": 1}}}, "layer 1: expected an ordinary layer as"),
]


@pytest.mark.parametrize(("given", "expected"), BAD)
def test_what_config_json_cannot_mean_is_refused(given: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parse_blocks(given, 6)


def test_a_missing_linear_or_tensor_is_refused_by_name(replaced: Made, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "out"
    shutil.copytree(replaced("shared"), out)
    config = json.loads((out / "config.json").read_text())
    blocks = config["quantization_config"]["blocks"]
    first = next(iter(blocks))
    blocks[first]["ranks"]["self_attn.v_proj"] = 4
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"v_proj.adapter.lora_A.weight: expected by config.json"):
        ordinary(out)
    assert any("v_proj.adapter" in str(problem) for problem in verify(out))
    blocks[first]["ranks"] = {"self_attn.z_proj": 4}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"expected a linear 'self_attn\.z_proj'"):
        ordinary(out)


def test_blocks_round_trip(replaced: Made) -> None:
    blocks = read_blocks(replaced("shared"), 6)
    assert all(isinstance(block, Block) and block.source is not None for block in blocks.values())
    assert RUNS["shared"] == {"replace": ("shared",)}


def test_replaced_layers_are_not_compressed_again(
    replaced: Made,
    documents: Path,
    tmp_path: Path,
) -> None:
    for options in ({"method": "wanda", "pattern": "2:4"}, OPTIONS):
        config = Config(calibration=str(documents), **options)
        with pytest.raises(UsageError, match="has layers that are replaced"):
            compress(replaced("shared"), tmp_path / "out", config)


def test_training_lowers_the_loss_and_goes_on_after_a_stop(
    replaced: Made, text: Path, tmp_path: Path
) -> None:
    training = Training(steps=24, seq_len=32, batch=2, rate=3e-3, threads=1)
    model, whole, out = replaced("faithful"), tmp_path / "whole", tmp_path / "out"
    found = train(model, whole, text, training)
    assert found["loss_last"] < 0.95 * found["loss_first"]
    with pytest.raises(KeyboardInterrupt):
        train(model, out, text, training, progress=_Stopping(22))
    with pytest.raises(UsageError, match="unfinished training whose options: rate differs"):
        train(model, out, text, dataclasses.replace(training, rate=1.0))
    assert train(model, out, text, training) == found
    assert verify(out) == []
    before, after = tensors_of(model), tensors_of(out)
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith("output_gamma") for name in changed)
    assert any(name.endswith("lora_B.weight") for name in changed)
    replaced_layers = {f"model.layers.{index}." for index in blocks_of(model)}
    assert all(any(name.startswith(p) for p in replaced_layers) for name in changed)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"steps": 0}, "option steps: expected at least 1, found 0"),
     ({"seq_len": 1}, "option seq_len: expected at least 2, found 1"),
     ({"rate": -1.0}, "option rate: expected a positive number, found -1.0")],
)  # fmt: skip
def test_options_of_training_are_checked(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        Training(**options)


def test_training_needs_something_to_train(deep: Deep, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected replaced layers to train, found none"):
        train(deep("llama"), tmp_path / "out", text)
