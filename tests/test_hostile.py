"""Folders made to do harm, or only damaged, as a user of the command line meets them.

Code in them is in test_hostile_code.py, GGUF files are in test_hostile_gguf.py.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import COMMANDS, CommandLine, config, edit_json, text_of
from safetensors.torch import load_file, save_file

from rsprune.config import Config
from rsprune.run import compress

RUNS = ("plan", "compress", "eval")
BUILDS = (*RUNS, "verify")
DOWN, NORM = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DEEP = "[" * 100_000
Damage = Callable[[Path], object]


@pytest.fixture
def sharded(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy in several shards, that a test may break."""
    return Path(shutil.copytree(tiny("llama", shards=3), tmp_path / "model"))


@pytest.fixture
def single(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy in one file, that a test may break."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def header(content: str | bytes, data: bytes = b"", length: int | None = None) -> Damage:
    """One file with this header; `length` is what its first bytes say."""
    raw = content.encode() if isinstance(content, str) else content
    prefix = (len(raw) if length is None else length).to_bytes(8, "little")
    return text_of(SINGLE, prefix + raw + data)


def entry(shape: list[int], begin: int, end: int, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS: dict[str, tuple[Damage, str]] = {
    "length bomb": (header("{}", length=2**63), r"100000000 bytes, found 9223372036854775808"),
    "not UTF-8": (header(b'{"\xff":1}'), "not UTF-8 at byte 10"),
    "deep JSON": (header('{"a":' + DEEP), "header is not valid"),
    "duplicate key": (header('{"__metadata__":{},"__metadata__":{}}'), "duplicate key"),
    "overlap": (
        header(json.dumps({"a": entry([4], 0, 4), "b": entry([4], 2, 6)}), bytes(6)),
        'overlap: tensor "b"',
    ),
    "hole": (
        header(json.dumps({"a": entry([4], 0, 4), "b": entry([1], 5, 6)}), bytes(6)),
        'hole: tensor "b"',
    ),
    "overflow": (
        header(json.dumps({"a": entry([2**40, 2**40], 0, 0)})),
        'tensor "a".*overflows',
    ),
    "wrong dtype size": (
        header(json.dumps({"a": entry([3], 0, 5, "BF16")}), bytes(5)),
        'tensor "a".*expected 6 bytes, found 5',
    ),
    "a pickle": (text_of(SINGLE, b"\x80\x04cos\nsystem\n" + bytes(20)), "header length"),
    "nothing": (text_of(SINGLE, b""), "truncated"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(single: Path, command_line: CommandLine, name: str):
    damage, message = HEADERS[name]
    damage(single)
    for command in COMMANDS:
        said = command_line.refusal(command, single)
        assert re.search(message, said)
        assert SINGLE in said


def mapped(**changes: str | None) -> Damage:
    """Other entries of the index, `down` for that of `DOWN`; None removes one."""

    def damage(folder: Path) -> None:
        entries = json.loads((folder / INDEX).read_text())["weight_map"]
        entries |= {DOWN if name == "down" else name: file for name, file in changes.items()}
        entries = {name: file for name, file in entries.items() if file is not None}
        edit_json(folder / INDEX, weight_map=entries)

    return damage


def linked_out(folder: Path) -> None:
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][DOWN]
    outside = file.rename(folder.parent / "outside.safetensors")
    file.symlink_to(outside)


def held_twice(folder: Path) -> None:
    own = json.loads((folder / INDEX).read_text())["weight_map"][DOWN]
    other = next(path for path in sorted(folder.glob("*.safetensors")) if path.name != own)
    tensors = load_file(other)
    save_file({**tensors, DOWN: load_file(folder / own)[DOWN] * 2}, other, {"format": "pt"})


INDICES: dict[str, tuple[Damage, str]] = {
    "parent": (mapped(down="../x.safetensors"), "not a path inside the folder"),
    "absolute": (mapped(down="/x.safetensors"), "not a path inside the folder"),
    "link out": (linked_out, "leaves the checkpoint folder"),
    "pickled shard": (mapped(down="pytorch_model.bin"), "never loaded"),
    "tensor that no file holds": (
        mapped(more="model-00001-of-00004.safetensors"),
        '"more" is mapped to .*does not hold it',
    ),
    "tensor in two shards": (held_twice, f'"{DOWN}" .*expected it there only'),
    "deep JSON": (text_of(INDEX, '{"weight_map":' + DEEP), "index is not valid"),
    "duplicate key": (text_of(INDEX, '{"weight_map":{"a":"x","a":"y"}}'), "duplicate key"),
    "not UTF-8": (text_of(INDEX, b'{"weight_map":{"\xff":"x"}}'), "index is not valid"),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices(sharded: Path, command_line: CommandLine, name: str):
    damage, message = INDICES[name]
    damage(sharded)
    for command in COMMANDS:
        assert re.search(message, command_line.refusal(command, sharded))


def test_a_tensor_that_the_index_does_not_name(sharded: Path, command_line: CommandLine):
    mapped(down=None)(sharded)
    for command in BUILDS:
        assert DOWN in command_line.refusal(command, sharded)


def test_a_pipe_is_not_waited_for(single: Path, command_line: CommandLine):
    (single / SINGLE).unlink()
    os.mkfifo(single / SINGLE)
    assert "missing model.safetensors" in command_line.refusal("plan", single)
    assert "expected a regular file" in command_line.refusal("inspect", single)
    assert "expected a regular file" in command_line.refusal("verify", single)


CONFIGS: dict[str, tuple[Damage, str]] = {
    "not JSON": (text_of("config.json", "{"), "config.json"),
    "not UTF-8": (text_of("config.json", b'{"a":"\xff"}'), "config.json"),
    "no object": (text_of("config.json", "[]"), "JSON object.*list"),
    "null": (text_of("config.json", "null"), "JSON object.*NoneType"),
    "deep": (text_of("config.json", '{"a":' + DEEP), "recursion depth"),
    "10**9 layers": (config(num_hidden_layers=10**9), "more than 3000 parameters.*30 tensors"),
    "no layers": (config(num_hidden_layers=0), "no list of decoder layers"),
    "-1 layers": (config(num_hidden_layers=-1), "no list of decoder layers"),
    "a layer too many": (
        config(num_hidden_layers=4),
        r"layers\.3\..*(needs|found none)|needs.*layers\.3\.",
    ),
    "hidden_size 0": (config(hidden_size=0), r"'weight' of shape \[300, 0\]"),
    "hidden_size -4": (config(hidden_size=-4), "-4"),
    "hidden_size 10**9": (config(hidden_size=10**9), r"shape \[300, 1000000000\]"),
    "hidden_size 10**30": (config(hidden_size=10**30), "config.json|no causal"),
    "hidden_size text": (config(hidden_size="32"), "hidden_size"),
    "head_dim 10**9": (config(head_dim=10**9), "'weight' of shape"),
    "no heads": (config(num_attention_heads=0), "config.json"),
    "other heads": (config(num_key_value_heads=1), r"k_proj.*expected shape \[8, 32\].*\[16, 32\]"),
    "another vocabulary": (
        config(vocab_size=299),
        r"embed_tokens.weight: expected shape \[299, 32\] from config.json, found \[300, 32\]",
    ),
    "vocabulary 10**12": (config(vocab_size=10**12), r"\[1000000000000, 32\]"),
    "padding outside": (config(pad_token_id=10**9), "no causal language model"),
    "unknown function": (config(hidden_act="no"), "no causal language model"),
    "no rotation": (
        config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        "no finite values for the buffer.*inv_freq",
    ),
    "list as type": (config(model_type=[]), "config.json"),
    "torch.load as dtype": (config(dtype="load"), "config.json|no causal"),
    "text as quantization": (config(quantization_config="x"), "config.json"),
    "kernels of a repository": (config(_attn_implementation="owner/name"), "to be downloaded"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(single: Path, command_line: CommandLine, name: str):
    damage, message = CONFIGS[name]
    damage(single)
    for command in BUILDS:
        assert re.search(message, command_line.refusal(command, single))


def test_buffers_that_no_memory_holds(
    tiny: Callable[..., Path], tmp_path: Path, command_line: CommandLine
):
    """No tensor on disk speaks against them: GPT-J computes its angles for every position."""
    from transformers import GPTJConfig, GPTJForCausalLM

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 300}
    model = GPTJForCausalLM(GPTJConfig(**sizes, n_positions=64, bos_token_id=0, eos_token_id=0))
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    model.save_pretrained(folder)
    assert command_line.run(command_line.arguments("plan", folder))[0] == 0
    edit_json(folder / "config.json", n_positions=10**11)
    assert "buffers of" in command_line.refusal("plan", folder)


def tokenizer(**changes: Any) -> Damage:
    """Other parts of tokenizer.json."""
    return lambda folder: edit_json(folder / "tokenizer.json", **changes)


HIGH = {"id": 70_000, "content": " the", "special": False, "normalized": False}
HIGH |= {"single_word": False, "lstrip": False, "rstrip": False}
BPE = {"type": "BPE", "vocab": {}, "merges": []}
CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
REPLACE = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}

TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "configuration is a list": (text_of("tokenizer_config.json", "[]"), "no tokenizer"),
    "configuration is deep": (text_of("tokenizer_config.json", DEEP), "no tokenizer"),
    "empty": (text_of("tokenizer.json", ""), "no tokenizer"),
    "deep": (text_of("tokenizer.json", DEEP), "no tokenizer"),
    "negative id": (tokenizer(model=BPE | {"vocab": {"a": -1}}), "no tokenizer"),
    "id outside of the model": (
        tokenizer(model=BPE | {"vocab": {"a": 4_000_000_000}}),
        "ids below 300.*found 4000000000",
    ),
    "unknown merge": (tokenizer(model=BPE | {"merges": ["b c"]}), "no tokenizer"),
    "panics when loaded": (tokenizer(normalizer=CHARSMAP), "no tokenizer"),
    "panics when used": (tokenizer(normalizer=REPLACE), "tokenizer: "),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(single: Path, command_line: CommandLine, name: str):
    damage, message = TOKENIZERS[name]
    damage(single)
    for command in ("compress", "eval"):
        assert re.search(message, command_line.refusal(command, single))


def changed(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """A damage: another tensor of that name."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        tensors[name] = edit(tensors.get(name, torch.empty(0))).contiguous()
        save_file(tensors, folder / SINGLE, {"format": "pt"})

    return damage


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[5] = value
        return tensor

    return edit


WEIGHTS: dict[str, tuple[Damage, str, tuple[str, ...]]] = {
    "no values": (changed(DOWN, lambda t: t[:0]), rf"{DOWN}: .*found \[0, 64\]", BUILDS),
    "no dimension": (changed(NORM, lambda t: t[0]), rf"{NORM}: .*found \[\]", BUILDS),
    "flat": (changed("lm_head.weight", lambda t: t.reshape(-1)), r"found \[9600\]", BUILDS),
    "8-bit norm": (changed(NORM, lambda t: t.to(torch.float8_e4m3fn)), f"{NORM}.*F8_E4M3", BUILDS),
    "complex norm": (changed(NORM, lambda t: t.to(torch.complex64)), f"{NORM}.*C64", BUILDS),
    "integer norm": (changed(NORM, torch.Tensor.long), f"{NORM}.*found I64", BUILDS),
    "NaN": (changed(DOWN, with_value(torch.nan)), f"{DOWN}: .*nan at flat index 5", ("compress",)),
    "Inf in a norm": (changed(NORM, with_value(torch.inf)), f"{NORM}: .*inf at", ("compress",)),
    "NaN that nothing uses": (
        changed("more", lambda t: torch.full((3,), torch.nan)),
        "more: .*nan at flat index 0",
        ("compress",),
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(single: Path, command_line: CommandLine, name: str):
    damage, message, commands = WEIGHTS[name]
    damage(single)
    for command in commands:
        assert re.search(message, command_line.refusal(command, single))


def test_eval_finds_no_figure_for_weights_that_are_not_finite(
    single: Path, command_line: CommandLine
):
    changed(DOWN, with_value(torch.nan))(single)
    assert "expected a finite loss, found nan" in command_line.refusal("eval", single)


def test_tensors_that_no_layer_uses_are_kept(single: Path, tmp_path: Path, text: Path):
    """One without values among them, which no memory map can lend."""
    changed("nothing", lambda t: torch.zeros(0, 4))(single)
    changed("more.weight", lambda t: torch.arange(6.0).reshape(2, 3))(single)
    edit_json(single / "config.json", num_hidden_layers=2)  # so a third layer's are not used, too
    settings = Config(calibration=str(text), samples=4, seq_len=32, threads=1, method="magnitude")
    compress(single, tmp_path / "out", settings)
    before = load_file(single / SINGLE)
    after = {
        name: tensor
        for path in (tmp_path / "out").glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert after.keys() == before.keys()
    unused = [name for name in before if "layers" not in name or "layers.2." in name]
    assert {"nothing", "more.weight", "model.layers.2.mlp.up_proj.weight"} <= set(unused)
    for name in unused:
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_denormal_weights_are_weights(single: Path, tmp_path: Path, text: Path, dtype: torch.dtype):
    """None is taken for zero: kept ones stay bit for bit, for any number of threads."""
    least = torch.finfo(dtype).smallest_normal
    scale = least * torch.randint(1, 60, (32, 64)) / 64
    tiny_weights = (scale * torch.where(torch.rand(32, 64) < 0.5, -1, 1)).to(dtype)
    assert bool(((tiny_weights != 0) & (tiny_weights.abs() < least)).all())
    changed(DOWN, lambda t: tiny_weights)(single)
    found = []
    for threads in (1, 3):
        settings = Config(
            calibration=str(text), samples=4, seq_len=32, threads=threads, method="magnitude"
        )
        out = tmp_path / f"out-{threads}"
        compress(single, out, settings)
        files = (load_file(path) for path in out.glob("*.safetensors"))
        found.append(next(tensors[DOWN] for tensors in files if DOWN in tensors))
    kept = found[0] != 0
    assert torch.equal(found[0], found[1])
    assert bool((kept.reshape(32, 16, 4).sum(2) == 2).all())
    assert torch.equal(found[0][kept], tiny_weights[kept])


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: \xff\xfe\n---\n",
        b"---\nlicense: !!python/object/apply:os.system [exit]\n---\n",
        b"---\n" + b"[" * 100_000 + b"\n---\n",
        b"---\nlicense: 2001-99-99\n---\n",
    ],
    ids=["not UTF-8", "code", "deep", "no date"],
)
def test_a_broken_card_does_not_end_a_run(single: Path, command_line: CommandLine, card: bytes):
    """It is read when all layers are done."""
    (single / "README.md").write_bytes(card)
    code, _, err = command_line.run(command_line.arguments("compress", single))
    assert code == 0, err
    assert "pruned" in (command_line.results / "out" / "README.md").read_text()


def test_files_that_cannot_be_copied_are_refused_before_the_run(
    single: Path, command_line: CommandLine
):
    (single / "notes.txt").symlink_to("/etc/hostname")
    assert "notes.txt: leaves the checkpoint folder" in command_line.refusal("compress", single)
    (single / "notes.txt").unlink()
    os.mkfifo(single / "notes.txt")
    assert "notes.txt: expected a file" in command_line.refusal("compress", single)


REPORTS: dict[str, tuple[str, str]] = {
    "deep": (DEEP, "line 1.*bad JSON"),
    "list as kind": ('{"kind":["run"]}', "line 1.*expected a kind"),
    "shape": ('{"kind":"tensor","name":"lm_head.weight","shape":3}', "expected list in 'shape'"),
    "sparsity": ('{"kind":"tensor","name":"lm_head.weight","sparsity":"x"}', "in 'sparsity'"),
    "pattern": ('{"kind":"tensor","name":"lm_head.weight","pattern":[1]}', "in 'pattern'"),
    "file": ('{"kind":"run"}\n{"kind":"layer","layer":0,"file":"../config.json"}', "a path out"),
}


@pytest.mark.parametrize("name", REPORTS)
def test_reports(single: Path, command_line: CommandLine, name: str):
    content, message = REPORTS[name]
    (single / "rsprune-report.jsonl").write_text(content)
    assert re.search(message, command_line.refusal("verify", single))


def test_names_cannot_write_to_the_terminal(single: Path, command_line: CommandLine):
    changed("\x1b[2Jwiped\n\rerror", lambda t: torch.ones(2, 2))(single)
    code, out, _ = command_line.run(["inspect", str(single), "--all"])
    assert code == 0
    assert "wiped" in out
    assert "\x1b[2J" not in out
    assert not any(line.startswith("error") for line in out.splitlines())
