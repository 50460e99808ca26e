"""A run as a whole: the same bytes again, what is kept dense, and how it ends when it fails."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import Run, tensors_of

from rsprune import methods, plan
from rsprune.config import Config
from rsprune.errors import UsageError
from rsprune.memory_plan import SPILLS
from rsprune.run import compress
from rsprune.verify import verify

METHODS = ("magnitude", "wanda", "sparsegpt", "fista")
Runs = Callable[[str, str, str], Run]


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_and_any_number_of_threads_give_the_same_bytes(
    compressed: Runs, tmp_path: Path, method: str
):
    run = compressed("llama_tied", method, "50%")
    recipe = Config.from_recipe(run.out / "recipe.yaml")
    assert recipe == run.config
    compress(run.model, tmp_path / "again", recipe)
    assert shard_bytes(tmp_path / "again") == shard_bytes(run.out)
    compress(run.model, tmp_path / "two", recipe.model_copy(update={"threads": 2}))
    assert shard_bytes(tmp_path / "two") == shard_bytes(run.out)
    other = recipe.model_copy(update={"seed": 1})
    compress(run.model, tmp_path / "other", other)
    same = shard_bytes(tmp_path / "other") == shard_bytes(run.out)
    assert same == (method == "magnitude")  # all others look at the documents


def test_what_is_spilled_to_files_gives_the_same_bytes(
    compressed: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = plan.fit
    monkeypatch.setattr(plan, "fit", lambda *args: (original(*args)[0], SPILLS))
    for method in METHODS:
        run = compressed("llama_tied", method, "2:4")
        compress(run.model, tmp_path / method, run.config)
        assert shard_bytes(tmp_path / method) == shard_bytes(run.out)
        assert not (tmp_path / method / ".scratch").exists()


def test_overwrite_replaces(compressed: Runs, tmp_path: Path):
    run, out = compressed("llama_tied", "wanda", "2:4"), tmp_path / "out"
    out.mkdir()
    (out / "old.safetensors").write_bytes(b"old")
    with pytest.raises(UsageError, match="replaces only what rsprune wrote"):
        compress(run.model, out, run.config, overwrite=True)
    (out / "rsprune-report.jsonl").write_text("")
    compress(run.model, out, run.config, overwrite=True)
    assert not (out / "old.safetensors").exists()
    assert shard_bytes(out) == shard_bytes(run.out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_in_the_first_layer_leaves_nothing(
    compressed: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, overwrite: bool
):
    run, out, seen = compressed("llama_tied", "wanda", "2:4"), tmp_path / "out", []
    if overwrite:
        out.mkdir()
        (out / "rsprune-report.jsonl").write_text("kept")
    original = methods.get("wanda").solve

    def solve(*args: Any, **kwargs: Any) -> Any:
        seen.append((out.with_name("out.partial") / "rsprune-report.jsonl").exists())
        if len(seen) > 5:  # some linears of the first layer went well
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(methods.get("wanda"), "solve", solve)
    with pytest.raises(type(error)):
        compress(run.model, out, run.config, overwrite=overwrite)
    assert all(seen)
    assert [path.name for path in tmp_path.rglob("*")] == (
        ["out", "rsprune-report.jsonl"] if overwrite else []
    )


def test_tied_tensors_are_written_once(compressed: Runs, tmp_path: Path):
    run = compressed("llama_tied", "wanda", "2:4")
    model = tmp_path / "model"
    shutil.copytree(run.model, model, ignore=shutil.ignore_patterns("model*"))
    tensors = tensors_of(run.model)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, model / "model.safetensors")
    compress(model, tmp_path / "out", run.config)
    assert shard_bytes(tmp_path / "out") == shard_bytes(run.out)
    assert verify(tmp_path / "out") == []
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (run.out / index).read_bytes()
    other = {**tensors, "lm_head.weight": embedding + 1}  # transformers does not tie these
    save_file(other, model / "model.safetensors")
    compress(model, tmp_path / "both", run.config)
    both = tensors_of(tmp_path / "both")
    assert torch.equal(both["lm_head.weight"], embedding + 1)
    assert torch.equal(both["model.embed_tokens.weight"], embedding)


def test_ignored_tensors_stay_dense(compressed: Runs, tmp_path: Path):
    run = compressed("llama_tied", "wanda", "2:4")
    config = run.config.model_copy(update={"ignore": ("*.o_proj", "model.layers.1.*")})
    report = compress(run.model, tmp_path / "out", config)
    before, after = tensors_of(run.model), tensors_of(tmp_path / "out")
    dense = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    names = {record["name"] for record in report.tensors}
    assert names == set(after) - dense
    assert len(names) == 2 * 6
    assert not any("o_proj" in name or ".layers.1." in name for name in names)
