"""Folders to GGUF files: what a reader finds is what the folder holds, or the export is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import build, save_tokenizer
from tiny_models import tensors_of

from rsprune import gguf_export
from rsprune.errors import UsageError
from rsprune.gguf_export import Exported, export_gguf
from rsprune.gguf_import import convert
from rsprune.report import Journal

gguf = pytest.importorskip("gguf")

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""llama.cpp's names, from its own list, and those on disk."""


def on_disk(name: str) -> str:
    if not name.startswith("blk."):
        kind, _, leaf = name.partition(".")
        return f"{NAMES[kind]}.{leaf}"
    _, layer, kind, leaf = name.split(".")
    return f"model.layers.{layer}.{NAMES[kind]}.{leaf}"


def signs_of(raw: np.ndarray, rows: int) -> np.ndarray:
    """Q1_0 read bit by bit."""
    values = []
    for block in raw.reshape(-1, 18):
        scale = float(block[:2].view(np.float16)[0])
        values += [scale if block[2 + j // 8] >> j % 8 & 1 else -scale for j in range(128)]
    return np.array(values, np.float32).reshape(rows, -1)


def tensors_in(path: Path, heads: dict[str, int]) -> dict[str, tuple[str, np.ndarray]]:
    """Type and values by on-disk name; rows of `heads` as transformers wants them."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type.name == "Q1_0":
            values = signs_of(tensor.data, int(tensor.shape[1]))
        else:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "rope_freqs.weight":
            found[tensor.name] = (tensor.tensor_type.name, values)
            continue
        name = on_disk(tensor.name)
        if count := heads.get(name.split(".")[-2]):
            values = LlamaTensorProcessor()._reverse_permute_weights(values, count)
        found[name] = (tensor.tensor_type.name, values)
    return found


HEADS = {"q_proj": 4, "k_proj": 2}
FAMILIES: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("Llama", {"tie_word_embeddings": True}, HEADS),
    ("Llama", {"tie_word_embeddings": False, "head_dim": 32}, HEADS),
    ("Llama", {"attention_bias": True, "mlp_bias": True}, HEADS),
    ("Mistral", {"sliding_window": 64}, HEADS),
    ("Qwen2", {"tie_word_embeddings": True}, {}),
    ("Qwen3", {"head_dim": 32, "attention_bias": False}, {}),
]


@pytest.mark.parametrize(("family", "options", "heads"), FAMILIES)
def test_a_reader_finds_the_weights_of_the_folder(
    tmp_path: Path, family: str, options: dict[str, Any], heads: dict[str, int]
):
    folder = build(tmp_path / "model", family, **options)
    weights = tensors_of(folder)
    for kind in ("F16", "BF16", "F32"):
        exported = export_gguf(folder, tmp_path / f"{kind}.gguf", kind)
        found = tensors_in(exported.path, heads)
        assert found.keys() == weights.keys()
        assert exported.rounded == 0
        for name, (stored, values) in found.items():
            assert stored == ("F32" if weights[name].dim() == 1 else kind), name
            assert np.array_equal(values, weights[name].float().numpy()), name
        assert exported.nbytes == exported.path.stat().st_size
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")] == []


@pytest.mark.parametrize(
    ("kind", "values"), [("TQ1_0", "ternary"), ("TQ2_0", "ternary"), ("Q1_0", "signs")]
)
def test_packed_types_hold_the_very_values(tmp_path: Path, kind: str, values: str):
    folder = build(tmp_path / "model", "Llama", values)
    weights = tensors_of(folder)
    exported = export_gguf(folder, tmp_path / "out.gguf", kind)
    found = tensors_in(exported.path, HEADS)
    assert exported.notes == []
    for name, (stored, read) in found.items():
        linear = weights[name].dim() == 2 and ".layers." in name
        assert stored == (kind if linear else "F16" if weights[name].dim() == 2 else "F32"), name
        assert np.array_equal(read, weights[name].float().numpy()), name
    part = next(part for part in exported.parts if part.kind == kind)
    bits = {"TQ1_0": 1.6875, "TQ2_0": 2.0625, "Q1_0": 1.125}[kind]
    assert part.nbytes * 8 == bits * math.prod(part.shape)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_import_gives_the_folder_back(tmp_path: Path, family: str):
    folder = build(tmp_path / "model", family, tie_word_embeddings=True)
    path = export_gguf(folder, tmp_path / "out.gguf", "F16").path
    back, weights = tensors_of(convert(path, tmp_path / "back")), tensors_of(folder)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("kind", "values"), [("TQ1_0", "ternary"), ("TQ2_0", "ternary"), ("Q1_0", "signs")]
)
def test_import_reads_packed_files(tmp_path: Path, kind: str, values: str):
    folder = build(tmp_path / "model", "Llama", values)
    path = export_gguf(folder, tmp_path / "out.gguf", kind).path
    back, weights = tensors_of(convert(path, tmp_path / "back")), tensors_of(folder)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def header(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_the_header_says_what_the_folder_says(tmp_path: Path):
    folder = build(tmp_path / "tiny model", "Mistral", sliding_window=64, head_dim=32)
    card = (
        "---\nlicense: other\nlicense_name: mine\nbase_model: owner/base\ntags: ['2:4', x]\n---\n"
    )
    (folder / "README.md").write_text(card)
    exported = export_gguf(folder, tmp_path / "out.gguf", "BF16")
    found = header(exported.path)
    expected = {
        "general.architecture": "llama",
        "general.name": "tiny model",
        "general.license": "other",
        "general.license.name": "mine",
        "general.base_model.count": 1,
        "general.base_model.0.name": "base",
        "general.base_model.0.organization": "owner",
        "general.tags": ["2:4", "x"],
        "general.file_type": gguf.LlamaFileType.MOSTLY_BF16,
        "llama.context_length": 64,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 300,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert exported.notes == ["context length 64: the sliding window; llama.cpp's llama has none"]


def test_rotary_scaling(tmp_path: Path):
    linear = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    found = header(
        export_gguf(
            build(tmp_path / "linear", rope_parameters=linear), tmp_path / "a.gguf", "F16"
        ).path
    )
    assert found["llama.rope.scaling.type"] == "linear"
    assert found["llama.rope.scaling.factor"] == 4.0
    assert found["llama.rope.freq_base"] == 5e5
    scaled = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"factor": 8.0, "original_max_position_embeddings": 64}
    rope = {"rope_type": "llama3", "rope_theta": 1e4, **scaled}
    folder = build(tmp_path / "llama3", rope_parameters=rope)
    path = export_gguf(folder, tmp_path / "b.gguf", "F16").path
    kind, factors = tensors_in(path, HEADS)["rope_freqs.weight"]
    waves = 2 * math.pi * 1e4 ** (np.arange(0, 64, 2) / 64)
    smooth = np.clip((64 / waves - 1.0) / (4.0 - 1.0), 0.0, 1.0)  # published with Llama 3.1
    assert kind == "F32"
    assert 1.0 in factors
    assert 8.0 in factors
    np.testing.assert_allclose(factors, 1 / ((1 - smooth) / 8.0 + smooth), rtol=1e-5)


def test_linears_that_rsprune_left_dense_stay_f16(tmp_path: Path):
    folder = build(tmp_path / "model", "Llama", "ternary")
    chosen = "model.layers.0.mlp.down_proj.weight"
    report = Journal(folder)
    report.write("run", version="0")
    report.write("tensor", name=chosen, shape=[256, 512])
    report.close()
    exported = export_gguf(folder, tmp_path / "out.gguf", "TQ2_0")
    assert [part.source for part in exported.parts if part.kind == "TQ2_0"] == [chosen]
    kinds = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    expected = f"13 of 14 linears are F16 and not TQ2_0, left dense: {kinds}"
    assert exported.notes == [expected]


def test_rows_that_are_not_whole_blocks_stay_f16(tmp_path: Path):
    wide = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 48}
    folder = build(tmp_path / "model", "Llama", "dense", **wide)
    weights = tensors_of(folder)
    from safetensors.torch import save_file

    weights |= {n: torch.ones_like(w) for n, w in weights.items() if n.endswith("down_proj.weight")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    exported = export_gguf(folder, tmp_path / "out.gguf", "Q1_0")
    kinds = {part.source: part.kind for part in exported.parts if part.linear}
    assert {kinds[f"model.layers.{i}.mlp.down_proj.weight"] for i in (0, 1)} == {"Q1_0"}
    assert list(kinds.values()).count("F16") == 12
    assert "rows of 192 are no whole blocks of 128: gate_proj, k_proj" in exported.notes[0]


def change(folder: Path, name: str, place: tuple[int, ...], value: float) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights[name][place] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "value", "found"),
    [
        ("TQ2_0", 0.75, r"found 2 magnitudes from \S+ to \S+ in row 37 from column 0"),
        ("TQ1_0", 1e-30, r"found 2 magnitudes from 9\.9\d+e-31"),
        ("Q1_0", 0.0, r"found zeros among the signs in row 37 from column 128"),
    ],
)
def test_values_that_would_change_are_refused_by_place(
    tmp_path: Path, kind: str, value: float, found: str
):
    folder = build(tmp_path / "model", "Llama", "signs")
    name = "model.layers.1.self_attn.q_proj.weight"
    change(folder, name, (37, 200), value)
    target = tmp_path / "out.gguf"
    target.write_bytes(b"old")
    with pytest.raises(UsageError, match=rf"{name}: --type {kind} holds .*{found}.*--type F16"):
        export_gguf(folder, target, kind, overwrite=True)
    assert target.read_bytes() == b"old"
    assert not (tmp_path / "out.gguf.partial").exists()


def test_scales_that_half_precision_cannot_hold_are_refused(tmp_path: Path):
    folder = build(tmp_path / "model", "Llama", "signs")
    name = "model.layers.0.mlp.down_proj.weight"
    change(folder, name, (3, slice(0, 256)), 2.0**-30)
    with pytest.raises(UsageError, match="half precision cannot hold in row 3"):
        export_gguf(folder, tmp_path / "out.gguf", "TQ2_0")


def test_rounding_is_counted_and_overflow_refused(tmp_path: Path):
    folder = build(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    change(folder, name, (0, 0), 2.0**-30)
    exported = export_gguf(folder, tmp_path / "out.gguf", "F16")
    assert (exported.rounded, exported.largest_change) == (1, 2.0**-30)
    for value in (1e38, math.inf, math.nan):
        change(folder, name, (1, 5), value)
        with pytest.raises(UsageError, match=rf"{name}: expected finite values that F16 can hold"):
            export_gguf(folder, tmp_path / "other.gguf", "F16")
    assert exported.path.exists()
    assert not (tmp_path / "other.gguf").exists()


def settings(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path):
    folder = build(tmp_path / "model", "Llama")
    target = tmp_path / "out.gguf"
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    for changes, words in (
        ({"hidden_act": "gelu"}, "hidden_act: GGUF export expects silu, found 'gelu'"),
        ({"rope_parameters": rope}, "rope_type: GGUF export expects default, linear or llama3"),
    ):
        before = (folder / "config.json").read_text()
        settings(folder, **changes)
        with pytest.raises(UsageError, match=words):
            export_gguf(folder, target, "F16")
        (folder / "config.json").write_text(before)
    with pytest.raises(UsageError, match=r"q_proj\.bias: llama\.cpp's qwen3 has no such bias"):
        export_gguf(build(tmp_path / "qwen3", "Qwen3", attention_bias=True), target, "F16")
    assert not target.exists()


def test_other_classes_are_refused_with_the_list(tiny_llama: Path, tiny: Any, tmp_path: Path):
    known = "knows LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    with pytest.raises(UsageError, match=f"{known}; found OPTForCausalLM"):
        export_gguf(tiny("opt"), tmp_path / "out.gguf", "F16")
    with pytest.raises(UsageError, match=r"expects rows of whole blocks of 256.*--type F16"):
        export_gguf(tiny_llama, tmp_path / "out.gguf", "TQ2_0")


def test_tensors_without_a_place_are_refused(tmp_path: Path):
    folder = build(tmp_path / "model", tie_word_embeddings=True)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    copy = weights["model.embed_tokens.weight"].clone()
    more = {"lm_head.weight": copy, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | more, folder / "model.safetensors", {"format": "pt"})
    assert len(export_gguf(folder, tmp_path / "a.gguf", "F16").parts) == len(weights)
    more = {"model.layers.7.extra.weight": torch.ones(2, 2)}
    save_file(weights | more, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"without a place in it: model\.layers\.7\.extra"):
        export_gguf(folder, tmp_path / "b.gguf", "F16")


def test_targets_are_checked_first(tmp_path: Path):
    folder, target = tmp_path / "none", tmp_path / "out.gguf"
    target.write_bytes(b"")
    for path, kind, words in (
        (target, "F16", r"out\.gguf: exists already; name another or pass --overwrite"),
        (tmp_path / "out.bin", "F16", r"expected the name of a \.gguf file"),
        (tmp_path / "no" / "out.gguf", "F16", "expected a folder to write to, found none"),
        (tmp_path / "new.gguf", "Q4_0", "--type: expected one of F32, F16, BF16, TQ1_0, .*'Q4_0'"),
    ):
        with pytest.raises(UsageError, match=words):
            export_gguf(folder, path, kind)
    with pytest.raises(UsageError, match="none: expected a folder"):
        export_gguf(folder, tmp_path / "new.gguf", "F16")


def test_no_room_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = build(tmp_path / "model")
    monkeypatch.setattr("rsprune.gguf_export.free_bytes", lambda path: 10)
    with pytest.raises(UsageError, match=r"out\.gguf: needs \d+ bytes on disk, found 10 bytes"):
        export_gguf(folder, tmp_path / "out.gguf", "F16")


def test_two_exports_do_not_write_one_file(tmp_path: Path):
    folder, target = build(tmp_path / "model"), tmp_path / "out.gguf"
    with gguf_export._alone(tmp_path / "out.gguf.partial"):
        with pytest.raises(UsageError, match=r"out\.gguf\.partial: another export is writing it"):
            export_gguf(folder, target, "F16")
        assert (tmp_path / "out.gguf.partial").exists()
    export_gguf(folder, target, "F16")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = build(tmp_path / "model")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rsprune.gguf_export.sync", full)
    with pytest.raises(ValueError, match=r"out\.gguf: cannot be written: No space left"):
        export_gguf(folder, tmp_path / "out.gguf", "F16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command_says_what_it_wrote(tmp_path: Path, command_line: Any):
    folder, target = build(tmp_path / "model", "Llama", "ternary"), tmp_path / "out.gguf"
    save_tokenizer(folder, "qwen2")
    arguments = ["export", str(folder), str(target), "--type", "TQ2_0"]
    code, out, err = command_line.run(arguments)
    assert (code, err.count("error")) == (0, 0)
    assert "ffn_down" in out
    assert "bits per weight" in " ".join(out.split())
    code, out, _ = command_line.run([*arguments, "--overwrite", "--json"])
    said = json.loads(out.splitlines()[-1])
    assert code == 0
    assert said["bits_per_weight"] == pytest.approx(8 * said["nbytes"] / weights_of(said))
    code, _, err = command_line.run(arguments)
    assert code == 2
    assert "exists already" in err


def weights_of(said: dict[str, Any]) -> int:
    return sum(math.prod(part["shape"]) for part in said["parts"])


def test_bits_count_the_whole_file(tmp_path: Path):
    exported = export_gguf(build(tmp_path / "model"), tmp_path / "out.gguf", "F16")
    assert isinstance(exported, Exported)
    stored = sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(exported.path).tensors)
    assert exported.bits_per_weight == exported.path.stat().st_size * 8 / stored
