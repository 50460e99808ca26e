"""What is refused before hours are spent: by name, with exit code 2, and nothing is written."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rsprune import plan
from rsprune.cli import main
from rsprune.config import Config
from rsprune.driver import make_plan
from rsprune.errors import RspruneError, UsageError
from rsprune.evaluate import perplexity
from rsprune.run import compress

SMALL: dict[str, Any] = {"samples": 4, "seq_len": 32, "threads": 1}
DOWN = "model.layers.1.mlp.down_proj.weight"
SHARDS = 3


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that a test may break, in several shards."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama", shards=SHARDS), folder)
    assert len(list(folder.glob("*.safetensors"))) >= SHARDS
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "out"


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = shard_of(folder, name)
    tensors = load_file(path)
    save_file({**tensors, name: edit(tensors[name]).contiguous()}, path, {"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_at(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = value
        return tensor

    return edit


def truncate(folder: Path) -> None:
    path = shard_of(folder, DOWN)
    path.write_bytes(path.read_bytes()[:-2])


def leave_the_folder(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shutil.copyfile(shard_of(folder, DOWN), folder.with_name("outside.safetensors"))
    edit_json(path, weight_map=index["weight_map"] | {DOWN: "../outside.safetensors"})


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def pickle_only(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: shard_of(f, DOWN).unlink(), r"model-0000\d-of-.*safetensors"),
    "truncated shard": (truncate, r"model-0000\d-of-.*safetensors"),
    "F64 weight": (lambda f: change(f, DOWN, torch.Tensor.double), f"{DOWN}.*F32.*found F64"),
    "I8 weight": (lambda f: change(f, DOWN, torch.Tensor.char), f"{DOWN}.*BF16.*found I8"),
    "NaN weight": (lambda f: change(f, DOWN, set_at(torch.nan)), f"{DOWN}.*nan at flat index 197"),
    "infinite weight": (lambda f: change(f, DOWN, set_at(-torch.inf)), f"{DOWN}.*-inf"),
    "wrong shape": (lambda f: change(f, DOWN, torch.t), rf"{DOWN}.*\[32, 64\].*\[64, 32\]"),
    "index that leaves the folder": (leave_the_folder, "outside.safetensors"),
    "tokenizer missing": (drop_tokenizer, "no tokenizer"),
    "config.json missing": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config.json broken": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "unknown architecture": (
        lambda f: edit_json(f / "config.json", model_type="abacus"),
        "abacus",
    ),
    "quantized": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}),
        "unquantized weights, found gptq",
    ),
    "pickled weights only": (pickle_only, "expected safetensors weights"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_models(model: Path, out: Path, text: Path, name: str):
    damage, message = DAMAGES[name]
    damage(model)
    with pytest.raises(UsageError, match=message):
        compress(model, out, Config(calibration=str(text), **SMALL))
    assert_nothing_written(out)


def assert_nothing_written(out: Path) -> None:
    assert not out.exists()
    assert not out.parent.exists()  # so there is no .partial folder either


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "pattern that is none": ({"pattern": "3:5"}, "3:5.*4, 8 or 16"),
    "unknown method": ({"method": "guess"}, "guess.*magnitude, wanda, sparsegpt, fista"),
    "too little memory": ({"memory": "1MiB"}, "memory 1 MiB: too small.*decoder layer"),
    "nothing left to prune": ({"ignore": ["*"]}, "nothing is left to prune"),
    "too few tokens": ({"samples": 1000}, "text.txt: expected 32000 tokens.*samples fit"),
    "no such text": ({"calibration": "none.txt"}, "none.txt: no such file"),
    "no such GPU": ({"device": "cuda"}, "device: cuda"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(tiny_llama: Path, out: Path, text: Path, name: str):
    options, message = OPTIONS[name]
    if name == "no such GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    config = Config.create(**{"calibration": str(text), **SMALL, **options})
    with pytest.raises(UsageError, match=message):
        compress(tiny_llama, out, config)
    assert_nothing_written(out)


def test_a_pattern_that_does_not_divide(tiny_llama: Path, tmp_path: Path, out: Path):
    folder = tmp_path / "odd"
    shutil.copytree(tiny_llama, folder)
    edit_json(folder / "config.json", intermediate_size=60)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = tensor[:60].clone()
        elif "down_proj" in name:
            tensors[name] = tensor[:, :60].clone()
    save_file(tensors, path, {"format": "pt"})
    assert make_plan(folder, Config(pattern="2:4", **SMALL), out).operators  # 60 = 15 * 4
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.down_proj\.weight.*by 8, found 60"):
        compress(folder, out, Config(pattern="4:8", **SMALL))
    assert_nothing_written(out)


def test_too_few_tokens_for_a_dimension_are_warned_of(tiny_llama: Path):
    few = make_plan(tiny_llama, Config(**SMALL))
    assert any("down_proj.weight: 96 calibration tokens" in line for line in few.warnings)
    assert make_plan(tiny_llama, Config(**SMALL | {"samples": 8})).warnings == []


@pytest.mark.parametrize("method", ["wanda", "bi", "flexigpt"])
def test_windows_beyond_the_context_are_warned_of(tiny_llama: Path, method: str):
    removing = {} if method == "wanda" else {"remove": "1", "protect": "1,0"}
    for seq_len, expected in ((128, 0), (129, 1)):
        options = {"method": method, "samples": 8, "seq_len": seq_len, **removing}
        warnings = make_plan(tiny_llama, Config.create(text_tokens=32, **options)).warnings
        told = f"windows of {seq_len} tokens: the model was made for 128 positions"
        assert warnings.count(told) == expected


@pytest.mark.parametrize("seq_len", [128, 129])
def test_windows_beyond_a_table_of_positions_are_refused(
    tiny: Callable[..., Path], out: Path, text: Path, seq_len: int
):
    model, config = tiny("opt"), Config.create(calibration=str(text), samples=2, seq_len=seq_len)
    if seq_len == 128:
        assert make_plan(model, config, out).operators
        assert perplexity(model, text, seq_len=seq_len, windows=1).windows == 1
        return
    with pytest.raises(UsageError, match=r"windows of 129.*128 positions, in a table"):
        compress(model, out, config)
    assert_nothing_written(out)
    with pytest.raises(UsageError, match=r"windows of 129.*128 positions, in a table"):
        perplexity(model, text, seq_len=seq_len + 1)  # the last token is only predicted


def test_a_full_disk(tiny_llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    needed = make_plan(tiny_llama, Config(**SMALL)).output_bytes
    monkeypatch.setattr(plan, "free_bytes", lambda path: needed - 1)
    with pytest.raises(UsageError, match=f"needs {needed} bytes on disk, found {needed - 1}"):
        compress(tiny_llama, out, Config(**SMALL))
    assert_nothing_written(out)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_never_over_the_input(model: Path, place: str, overwrite: bool):
    before = contents(model.parent)
    with pytest.raises(UsageError, match="must lie apart from the input"):
        compress(model, model / place, Config(**SMALL), overwrite=overwrite)
    assert contents(model.parent) == before


def test_never_over_a_gguf_file(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The checkpoint that it is converted to lies elsewhere."""
    file = tmp_path / "folder" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    monkeypatch.setattr("rsprune.run.resolve", lambda *_, **__: tiny_llama)
    with pytest.raises(UsageError, match="must lie apart from the input"):
        compress(file, file.parent, Config(**SMALL), overwrite=True)
    assert contents(tmp_path) == {Path("folder/model.gguf"): b"GGUF"}


def test_an_output_that_exists(model: Path, out: Path):
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"exists already.*--overwrite"):
        compress(model, out, Config(**SMALL))
    assert contents(out.parent) == {Path("out/thesis.txt"): b"years of work"}


def test_an_output_that_is_a_file(model: Path, out: Path):
    out.parent.mkdir(parents=True)
    out.write_text("a file")
    with pytest.raises(UsageError, match="expected a folder, found a file"):
        compress(model, out, Config(**SMALL), overwrite=True)
    assert contents(out.parent) == {Path("out"): b"a file"}


def contents(folder: Path) -> dict[Path, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.parametrize("method", ["sparsegpt", "fista"])
def test_activations_that_overflow_are_located(model: Path, out: Path, text: Path, method: str):
    """All weights are finite; what the first layer adds to one token's embedding is not."""
    token = text.read_bytes()[0]

    def explode(tensor: torch.Tensor) -> torch.Tensor:
        tensor[token] = 3e38
        return tensor

    change(model, "model.embed_tokens.weight", explode)
    change(model, "model.layers.0.self_attn.o_proj.weight", lambda t: t * 1e38)
    config = Config(calibration=str(text), method=method, ignore=("*.0.self_attn.*",), **SMALL)
    where = r"layer 0, inputs of mlp\.gate_proj, window \d: activations"
    with pytest.raises(RspruneError, match=where) as caught:
        compress(model, out, config)
    assert not isinstance(caught.value, UsageError)  # this could not be seen before the run
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "guess"], "guess"),
        (["--pattern", "2:5"], "2:5"),
        (["--memory", "1MiB"], "memory"),
        (["--recipe", "RECIPE"], "unknown option 'methode'"),
    ],
)
def test_the_command_line_says_one_line(
    tiny_llama: Path,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("methode: wanda\n")
    given = [str(recipe) if word == "RECIPE" else word for word in arguments]
    command = ["rsprune", "compress", str(tiny_llama), str(out), "--quiet", *given]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert_nothing_written(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["missing shard", "NaN weight", "quantized"])
def test_exit_code_of_the_process(model: Path, out: Path, text: Path, name: str):
    damage, message = DAMAGES[name]
    damage(model)
    command = [sys.executable, "-m", "rsprune", "compress", str(model), str(out)]
    command += ["--calibration", str(text), "--samples", "4", "--seq-len", "32", "--threads", "1"]
    source = str(Path(plan.__file__).parents[1])
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last)
    assert "Traceback" not in done.stderr
    assert_nothing_written(out)
