"""Whole runs on tiny models: what is on disk is what is reported, and it loads without us."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import LAYERS, Run, ordinary, tensors_of, token_ids

import rsprune
from rsprune.checkpoint import Checkpoint
from rsprune.inspect import inspect
from rsprune.report import load_report
from rsprune.skeleton import Skeleton, load_tokenizer
from rsprune.verify import verify

METHODS = ("magnitude", "wanda", "sparsegpt", "fista")
PATTERNS = ("2:4", "4:8", "50%")
OTHERS = ("llama", "opt", "opt_projected", "gpt_neox", "phi3", "gemma2", "gemma3", "qwen2", "qwen3")
CASES = [("llama_tied", method, pattern) for method in METHODS for pattern in PATTERNS]
CASES += [
    (kind, METHODS[number % 4], PATTERNS[(number + step) % 3])
    for step, kind in enumerate(OTHERS)
    for number in (step, step + 1)
]
each_case = pytest.mark.parametrize("case", CASES, ids=" ".join)
Runs = Callable[[str, str, str], Run]

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
ids, *folders = sys.argv[1:]
ids, logits = torch.load(ids), {}
for folder in folders:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], (folder, info)
    with torch.no_grad():
        logits[folder] = model(ids, use_cache=False).logits
assert not any(name.partition(".")[0] == "rsprune" for name in sys.modules)
torch.save(logits, sys.argv[1] + ".logits")
"""


@pytest.fixture(scope="module")
def loaded(compressed: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Logits of every output, from a process that has never heard of rsprune."""
    file = tmp_path_factory.mktemp("loaded") / "ids.pt"
    torch.save(token_ids(2, 16), file)
    folders = [str(compressed(*case).out) for case in CASES]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", LOAD, str(file), *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, torch.Tensor] = torch.load(f"{file}.logits")
    return found


def streamed(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from test_streaming import streamed_logits

    return streamed_logits(Skeleton(Checkpoint.open(folder)), ids)


@pytest.mark.slow
@each_case
def test_loads_in_a_new_process(compressed: Runs, loaded: dict[str, torch.Tensor], case: Any):
    run = compressed(*case)
    logits = loaded[str(run.out)]
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(streamed(run.out, token_ids(2, 16)), logits, rtol=1e-5, atol=1e-5)
    assert (streamed(run.model, token_ids(2, 16)) - logits).abs().max() > 0.1  # it was pruned


@each_case
def test_report_is_true_and_the_rest_unchanged(compressed: Runs, case: Any):
    run, (_, method, pattern) = compressed(*case), case
    report = load_report(run.out)
    assert verify(run.out) == []
    before, after = tensors_of(run.model), tensors_of(run.out)
    pruned = {record["name"]: record for record in report.tensors}
    matrices = {n for n, t in before.items() if t.dim() == 2 and ".layers." in f".{n}"}
    assert set(pruned) == matrices  # every linear of every layer, and nothing else
    facts = {fact.name: fact for fact in inspect(run.out)}
    for name, tensor in after.items():
        if name not in pruned:
            assert torch.equal(tensor.view(torch.int16), before[name].view(torch.int16)), name
            continue
        record, zeros = pruned[name], tensor == 0
        assert (record["method"], record["pattern"]) == (method, pattern)
        assert record["sparsity"] == zeros.float().mean() == facts[name].sparsity >= 0.5
        if ":" in pattern:
            keep, of = map(int, pattern.split(":"))
            assert zeros.reshape(-1, of).sum(1).min() >= of - keep
        elif record["scope"] == "row":
            assert zeros.sum(1).min() >= tensor.shape[1] // 2
        assert tensor.dtype == before[name].dtype
        assert 0 < record["error"] < 1
        assert 0 < record["heldout_error"] < 2
        if method in ("magnitude", "wanda"):
            assert torch.equal(tensor[~zeros], before[name][~zeros])
    assert set(after) == set(before)


@each_case
def test_shape_of_the_folder(compressed: Runs, case: Any):
    run, kind = compressed(*case), case[0]
    names = {path.name for path in run.out.iterdir()}
    shards = [f"model-{n:05d}-of-{LAYERS + 1:05d}.safetensors" for n in range(1, LAYERS + 2)]
    ours = {"README.md", "recipe.yaml", "rsprune-report.jsonl", "model.safetensors.index.json"}
    others = {p.name for p in run.model.iterdir() if not p.name.startswith("model")}
    assert others >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == {*shards, *ours, *others}
    for name in others:
        assert (run.out / name).read_bytes() == (run.model / name).read_bytes()
    skeleton = Skeleton(Checkpoint.open(run.out))
    index = json.loads((run.out / "model.safetensors.index.json").read_text())
    for number, shard in enumerate(shards):
        layer = number - 1 if number else None
        held = set(load_file(run.out / shard))
        assert held == {n for n, file in index["weight_map"].items() if file == shard}
        assert {skeleton.layer_of(name) for name in held} == {layer}
    tensors = tensors_of(run.out)
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in tensors.values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    if kind == "llama_tied":
        assert len(list(run.model.glob("*.safetensors"))) >= 3
        assert "lm_head.weight" not in tensors


def test_summary_adds_up(compressed: Runs):
    run = compressed("llama_tied", "fista", "2:4")
    report = load_report(run.out)
    tensors = tensors_of(run.out)
    pruned = [tensors[record["name"]] for record in report.tensors]
    assert report.summary is not None
    assert report.summary["weights"] == sum(t.numel() for t in pruned)
    assert report.summary["zeros"] == sum(int((t == 0).sum()) for t in pruned)
    assert report.summary["bytes_written"] == sum(t.nbytes for t in tensors.values())
    assert report.summary["planned_peak"] > report.summary["import_rss_anon"] > 0
    assert report.run["calibration"]["samples"] == 6
    assert report.run["calibration"]["heldout"] == 2
    assert [record["layer"] for record in report.layers] == list(range(LAYERS))


def group_inputs(model: Any, module: str, ids: torch.Tensor) -> torch.Tensor:
    """Inputs [tokens, channels] of one linear, float64."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    model(ids)
    handle.remove()
    return seen[0].flatten(0, 1).double()


@pytest.mark.parametrize("method", METHODS)
def test_errors_against_an_independent_computation(compressed: Runs, method: str):
    """||V X* - W X||^2 / ||W X||^2 for the last linear of the middle layer."""
    from rsprune.data import calibration_windows, load_texts, split_heldout

    run, module = compressed("llama_tied", method, "2:4"), "model.layers.1.mlp.down_proj"
    windows = calibration_windows(
        load_texts(*run.config.calibration),
        load_tokenizer(run.model),
        samples=6,
        seq_len=32,
        seed=0,
    )
    dense, pruned = ordinary(run.model), ordinary(run.out)
    own = ordinary(run.model)
    layers = [1] if method == "fista" else [0]  # independent layers, or layers one after another
    for layer in layers:
        state = pruned.model.layers[layer].state_dict()
        own.model.layers[layer].load_state_dict(state)
    record = next(r for r in load_report(run.out).tensors if r["name"] == f"{module}.weight")
    parts = split_heldout(windows, run.config.heldout)
    for part, key in zip(parts, ("error", "heldout_error"), strict=True):
        x_own = group_inputs(own, module, part)
        x = group_inputs(dense, module, part) if method == "fista" else x_own
        target = x @ dense.get_parameter(f"{module}.weight").double().T
        found = x_own @ pruned.get_parameter(f"{module}.weight").double().T
        error = float((found - target).square().sum() / target.square().sum())
        assert error > 0.01
        assert record[key] == pytest.approx(error, rel=1e-4)


def test_pruned_weights_are_what_is_propagated_and_evaluated(compressed: Runs, text: Path):
    ids = torch.tensor(list(text.read_bytes()[: 4 * 32])).reshape(4, 32)
    for case in (("llama_tied", "sparsegpt", "2:4"), ("llama_tied", "fista", "50%")):
        found = rsprune.perplexity(compressed(*case).out, text, seq_len=32, windows=4, threads=1)
        logits = ordinary(compressed(*case).out)(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
