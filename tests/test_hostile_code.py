"""Code that comes with a checkpoint: pickles are never loaded, Python only where it is allowed.

Every trap would create a file, and is shown to work before its absence proves anything.
"""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import CommandLine, Opens, config, edit_json

COMMANDS = ("plan", "compress", "eval", "verify")
PICKLES = ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt")
CODE = """
open({trap!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "abacus"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """The file that is there when code has run."""
    return tmp_path / "code-has-run"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def write_pickle(path: Path, trap: Path) -> None:
    path.write_bytes(pickle.dumps(Opens(trap)))
    with path.open("rb") as file:
        pickle.load(file).close()
    assert trap.exists()
    trap.unlink()


@pytest.mark.parametrize("name", PICKLES)
def test_pickled_weights_are_refused_by_name(
    model: Path, trap: Path, command_line: CommandLine, name: str
):
    (model / "model.safetensors").unlink()
    write_pickle(model / name, trap)
    for command in (*COMMANDS, "inspect"):
        said = command_line.refusal(command, model)
        assert name in said
        assert "never loaded" in said
    assert not trap.exists()


def test_a_pickle_by_its_own_name_or_under_a_false_one(
    model: Path, trap: Path, command_line: CommandLine
):
    write_pickle(model / "pytorch_model.bin", trap)
    assert "found a .bin file" in command_line.refusal("plan", model / "pytorch_model.bin")
    (model / "pytorch_model.bin").rename(model / "model.safetensors")
    for command in COMMANDS:
        assert "header length" in command_line.refusal(command, model)
    (model / "model.safetensors").rename(model / "model.gguf")
    assert "not a whole GGUF file" in command_line.refusal("plan", model / "model.gguf")
    assert not trap.exists()


def test_pickles_beside_the_weights_are_neither_loaded_nor_copied(
    model: Path, trap: Path, command_line: CommandLine
):
    for name in PICKLES:
        write_pickle(model / name, trap)
    for command in ("plan", "compress", "eval"):
        assert command_line.run(command_line.arguments(command, model))[0] == 0
    assert not trap.exists()
    written = {path.name for path in (command_line.results / "out").iterdir()}
    assert "config.json" in written
    assert not written & set(PICKLES)


def own_model(folder: Path) -> None:
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    edit_json(folder / "config.json", auto_map=names, model_type="abacus")


def own_tokenizer(folder: Path) -> None:
    names = {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}
    edit_json(folder / "tokenizer_config.json", auto_map=names, tokenizer_class="Tokenizer")


NEEDED = {"model": own_model, "tokenizer": own_tokenizer}


@pytest.mark.parametrize("kind", NEEDED)
def test_code_that_the_model_needs_runs_only_with_the_flag(
    model: Path, trap: Path, command_line: CommandLine, kind: str
):
    (model / "code.py").write_text(CODE.format(trap=str(trap)))
    NEEDED[kind](model)
    commands = COMMANDS if kind == "model" else ("compress", "eval")
    for command in commands:
        assert "custom code" in command_line.refusal(command, model)
    assert not trap.exists()
    code, _, err = command_line.run(
        [*command_line.arguments("compress", model), "--trust-remote-code"]
    )
    assert (code, trap.exists()) == (0, True), err
    copied = command_line.results / "out" / "code.py"
    assert copied.read_text() == (model / "code.py").read_text()


@pytest.mark.parametrize(
    "damage",
    [
        config(auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
        config(auto_map={"AutoTokenizer": ["code.Tokenizer", None]}),
        config(auto_map={"AutoConfig": "owner/name--code.Config"}),
        lambda f: edit_json(
            f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]}
        ),
    ],
)
def test_code_that_the_model_can_do_without_is_passed_over(
    model: Path, trap: Path, command_line: CommandLine, damage: Callable[[Path], None]
):
    (model / "code.py").write_text(CODE.format(trap=str(trap)))
    damage(model)
    for command in ("plan", "compress", "eval"):
        code, _, err = command_line.run(command_line.arguments(command, model))
        assert code == 0, err
    assert not trap.exists()
