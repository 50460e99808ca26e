"""A folder as a run leaves it passes; each single thing that is broken in it is found."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rsprune.errors import RspruneError
from rsprune.report import REPORT_NAME, Journal
from rsprune.verify import Problem, verify

NAME = "model.layers.0.mlp.down_proj.weight"
LAYER, REST = "model-00001.safetensors", "model-00000.safetensors"


def pruned(rows: int = 8, columns: int = 16) -> np.ndarray:
    values = np.ones((rows, columns), np.float32)
    values[:, 0::2] = 0
    return values


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_folder(folder: Path, *, report: bool = True, summary: bool = True) -> Path:
    save_file({NAME: pruned()}, folder / LAYER)
    save_file({"model.norm.weight": np.ones(16, np.float32)}, folder / REST)
    index = {"weight_map": {NAME: LAYER, "model.norm.weight": REST}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    if report:
        write_report(folder, summary=summary)
    return folder


def write_report(folder: Path, *, summary: bool = True, **changes: object) -> None:
    (folder / REPORT_NAME).unlink(missing_ok=True)
    journal = Journal(folder)
    journal.write("run", version="0", config={})
    fields = {"name": NAME, "layer": 0, "shape": [8, 16], "dtype": "F32", "sparsity": 0.5}
    journal.write("tensor", **(fields | {"pattern": "2:4", "scope": "row"} | changes))
    for kind, key, file in (("layer", {"layer": 0}, LAYER), ("file", {}, REST)):
        path = folder / file
        size = path.stat().st_size
        journal.write(kind, file=file, bytes=size, sha256=digest(path), **key)
    if summary:
        journal.write("summary", weights=128, zeros=64)
    journal.close()


@pytest.fixture(autouse=True)
def no_architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for torch and transformers, except where a test asks for them."""
    if request.node.get_closest_marker("slow"):
        return
    skeleton = ModuleType("rsprune.skeleton")
    skeleton.missing_tensors = lambda folder: []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rsprune.skeleton", skeleton)


def test_a_whole_folder_has_no_problem(tmp_path: Path):
    assert verify(write_folder(tmp_path)) == []


def resave(folder: Path, values: np.ndarray, name: str = NAME) -> None:
    """Other weights with a report that knows their hash, so that only the weights are wrong."""
    save_file({name: values}, folder / LAYER)


def break_pattern(folder: Path) -> None:
    values = pruned()
    values[3, 4:8], values[3, 8:12] = 1, 0  # as many zeros as before, elsewhere
    resave(folder, values)
    write_report(folder)


def break_sparsity(folder: Path) -> None:
    values = pruned()
    values[0, 1] = 0
    resave(folder, values)
    write_report(folder)


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / REST).read_bytes())
    content[-1] ^= 1
    (folder / REST).write_bytes(content)


def truncate(folder: Path) -> None:
    content = (folder / LAYER).read_bytes()
    (folder / LAYER).write_bytes(content[:-4])


def longer_file(folder: Path) -> None:
    norm = {"model.norm.weight": np.ones(32, np.float32)}
    save_file(norm, folder / REST)


def index_without_tensor(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": REST}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BREAKS: list[tuple[Callable[[Path], object], str, str]] = [
    (break_pattern, NAME, "expected pattern 2:4"),
    (break_sparsity, NAME, "expected sparsity 0.500000, found 0.507812"),
    (flip_a_byte, REST, "expected sha256"),
    (truncate, "weights", LAYER),
    (longer_file, REST, "bytes"),
    (index_without_tensor, NAME, "expected a tensor of the checkpoint"),
    (lambda f: (f / LAYER).unlink(), "weights", "missing"),
    (lambda f: (f / "model.safetensors.index.json").unlink(), "weights", "expected"),
    (lambda f: (f / f"{LAYER}.tmp").touch(), f"{LAYER}.tmp", "no temporary file"),
    (lambda f: (f / "config.json").unlink(), "config.json", "expected a file"),
    (lambda f: (f / "config.json").write_text("{"), "config.json", "valid JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json", "a JSON object"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer", "found none"),
    (lambda f: (f / REPORT_NAME).unlink(), REPORT_NAME, "cannot be read"),
    (lambda f: (f / REPORT_NAME).write_text("{"), REPORT_NAME, "line 1"),
    (lambda f: write_report(f, summary=False), REPORT_NAME, "unfinished run"),
    (lambda f: write_report(f, shape=[16, 8]), NAME, "expected shape [16, 8], found [8, 16]"),
    (lambda f: write_report(f, dtype="BF16"), NAME, "expected dtype BF16, found F32"),
    (lambda f: write_report(f, pattern="7:13"), NAME, "4, 8 or 16"),
    (lambda f: write_report(f, pattern="60%"), NAME, "expected pattern 60%"),
]


@pytest.mark.parametrize(("damage", "where", "text"), BREAKS)
def test_each_damage_is_found(
    tmp_path: Path, damage: Callable[[Path], object], where: str, text: str
):
    damage(write_folder(tmp_path))
    problems = [problem for problem in verify(tmp_path) if problem.where == where]
    assert problems, verify(tmp_path)
    assert text in str(problems[0])


def test_damages_of_weights_keep_the_premises_of_the_test(tmp_path: Path):
    break_pattern(write_folder(tmp_path))
    assert (load_file(tmp_path / LAYER)[NAME] == 0).sum() == 64  # so only the pattern is wrong
    assert len(verify(tmp_path)) == 1


@pytest.mark.parametrize(("pattern", "scope"), [("50%", "row"), ("0.5", "matrix"), ("2:4", None)])
def test_ratios_hold_over_their_scope(tmp_path: Path, pattern: str, scope: str | None):
    write_folder(tmp_path)
    write_report(tmp_path, pattern=pattern, scope=scope)
    assert verify(tmp_path) == []


def test_half_types_are_read_as_bits(tmp_path: Path):
    write_folder(tmp_path)
    resave(tmp_path, -pruned().astype(np.float16))
    assert np.signbit(load_file(tmp_path / LAYER)[NAME]).all()  # the zeros are -0
    write_report(tmp_path, dtype="F16")
    assert verify(tmp_path) == []


def test_a_folder_of_others_passes_only_where_it_may(tmp_path: Path):
    write_folder(tmp_path, report=False)
    assert [problem.where for problem in verify(tmp_path)] == [REPORT_NAME]
    assert verify(tmp_path, allow_plain=True) == []
    (tmp_path / "tokenizer.json").unlink()
    assert [problem.where for problem in verify(tmp_path, allow_plain=True)] == ["tokenizer"]


def test_missing_tensors_of_the_architecture(tmp_path: Path):
    write_folder(tmp_path)
    skeleton = sys.modules["rsprune.skeleton"]
    skeleton.missing_tensors = lambda folder: ["model.lm_head.weight"]  # type: ignore[attr-defined]
    expected = Problem("model.lm_head.weight", "a tensor that the architecture needs", "none")
    assert verify(tmp_path) == [expected]

    def refuse(folder: Path) -> list[str]:
        raise RspruneError("unknown model type")

    skeleton.missing_tensors = refuse  # type: ignore[attr-defined]
    assert "unknown model type" in str(verify(tmp_path)[0])


def test_no_folder_is_refused(tmp_path: Path):
    with pytest.raises(RspruneError, match="expected a folder"):
        verify(tmp_path / "none")


@pytest.mark.slow
def test_a_real_architecture_lacks_what_was_removed(tmp_path: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert verify(tmp_path, allow_plain=True) == []
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)
    (problem,) = verify(tmp_path, allow_plain=True)
    assert problem.where == "model.layers.1.mlp.up_proj.weight"
