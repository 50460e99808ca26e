"""The streamed forward is the model's own forward, with one decoder layer in memory at a time."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import (
    KINDS,
    LAYERS,
    VOCABULARY,
    groups_of,
    make,
    ordinary,
    save_tokenizer,
    token_ids,
)

from rsprune.checkpoint import Checkpoint
from rsprune.errors import RspruneError
from rsprune.evaluate import perplexity
from rsprune.head import Head
from rsprune.skeleton import MissingTensorsError, Skeleton
from rsprune.stream import Stream

Tiny = Callable[..., Path]


def materialised(skeleton: Skeleton) -> set[str]:
    named = skeleton.model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if parameter.device.type != "meta"}


def streamed_logits(skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
    """Logits [count, tokens, vocabulary], checking what is in memory on the way."""
    stream = Stream(skeleton)
    stream.open(ids.shape[1])
    hidden = list(stream.embed(ids))
    assert materialised(skeleton) == set()
    for index, layer in enumerate(skeleton.layers):
        skeleton.load_layer(index)
        prefix = f"{skeleton.layer_prefix}.{index}."
        held = {n for n, _ in layer.named_parameters() if ".experts." not in n}  # those are read
        assert materialised(skeleton) == {prefix + name for name in held}
        with torch.no_grad():
            outputs = [layer(states, **stream.kwargs(index)) for states in hidden]
        hidden = [output[0] if isinstance(output, tuple) else output for output in outputs]
        skeleton.drop_layer(index)
    pieces = []
    with stream.head():
        for _ in Head(stream).pieces():
            held = materialised(skeleton)
            assert not any(n.startswith(f"{skeleton.layer_prefix}.") for n in held)
            pieces.append(torch.stack([stream.logits(states) for states in hidden]))
    assert len(pieces) == len(range(0, VOCABULARY, Head(stream).piece))
    logits = torch.cat(pieces, -1)
    assert materialised(skeleton) == set()
    assert not any("forward" in vars(module) for module in skeleton.model.modules())
    return logits


@pytest.mark.parametrize("rows", [VOCABULARY, 97])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_ordinary_forward(tiny: Tiny, kind: str, rows: int, monkeypatch):
    monkeypatch.setattr("rsprune.head.PIECE_BYTES", rows * 4 * 32)
    skeleton = Skeleton(Checkpoint.open(tiny(kind)))
    model = ordinary(tiny(kind))
    for length in (24, 9):  # longer and about as long as the sliding windows
        ids = token_ids(2, length)
        expected = model(ids).logits
        assert expected.std() > 0.1  # so that a difference could be seen
        assert (expected[0] - expected[1]).abs().max() > 0.1
        torch.testing.assert_close(streamed_logits(skeleton, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_equals_the_ordinary_one(tiny: Tiny, text: Path, kind: str):
    found = perplexity(tiny(kind), text, seq_len=32, windows=5, threads=1)
    ids = torch.tensor(list(text.read_bytes()[: 5 * 32])).reshape(5, 32)
    logits = ordinary(tiny(kind))(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert (found.windows, found.tokens, found.seq_len) == (5, 5 * 31, 32)
    assert found.perplexity == pytest.approx(math.exp(losses), rel=1e-4)
    assert found.loss == pytest.approx(float(losses), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_found_in_order(tiny: Tiny, kind: str):
    opening = Stream(Skeleton(Checkpoint.open(tiny(kind)))).open(16)
    assert len(opening.structures) == LAYERS
    for index, structure in enumerate(opening.structures):
        assert [group.linears for group in structure.groups] == groups_of(kind, index)
    skeleton = Skeleton(Checkpoint.open(tiny(kind)))
    for group in opening.structures[0].groups:
        widths = {skeleton.layers[0].get_submodule(n).in_features for n in group.linears}
        assert widths == {group.width}


@pytest.mark.parametrize("kind", ["llama_tied", "opt", "gpt_neox"])
def test_names_without_the_prefix_of_the_base_model(tiny: Tiny, tmp_path: Path, kind: str):
    model = make(kind)
    model.base_model.save_pretrained(tmp_path)
    if kind == "gpt_neox":  # its output embedding is not tied, so a bare one needs it beside
        path = tmp_path / "model.safetensors"
        tensors = {**load_file(path), "embed_out.weight": model.get_output_embeddings().weight}
        save_file(tensors, path, {"format": "pt"})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        prefix = f"{model.base_model_prefix}."
        assert not any(name.startswith(prefix) for name in file.keys())  # noqa: SIM118
    skeleton, ids = Skeleton(Checkpoint.open(tmp_path)), token_ids(2, 12)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(streamed_logits(skeleton, ids), expected, rtol=1e-5, atol=1e-5)
    layers = {name: skeleton.layer_of(name) for name in skeleton.checkpoint.tensors}
    assert set(layers.values()) == {None, *range(LAYERS)}
    assert all(f".{index}." in f".{name}" for name, index in layers.items() if index is not None)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "opt", "mixtral", "qwen3_moe"])
def test_every_tensor_of_a_layer_is_told_apart(tiny: Tiny, kind: str):
    skeleton = Skeleton(Checkpoint.open(tiny(kind)))
    for index, layer in enumerate(skeleton.layers):
        names = [skeleton.layer_name(index, name) for name, _ in layer.named_parameters()]
        own = {skeleton.disk_name(name) for name in names}
        assert own == {n for n in skeleton.checkpoint.tensors if skeleton.layer_of(n) == index}


def test_missing_tensors_are_named(tiny_llama: Path, tmp_path: Path):
    tensors = load_file(tiny_llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(MissingTensorsError, match=name) as caught:
        Skeleton(Checkpoint.open(tmp_path))
    assert caught.value.names == [name]


def test_arguments_that_depend_on_the_tokens_are_refused(tiny_llama: Path, monkeypatch):
    stream = Stream(Skeleton(Checkpoint.open(tiny_llama)))
    stream.open(8)
    original = stream._record

    def record(embeddings: torch.Tensor, **options: bool) -> torch.Tensor:
        first = original(embeddings, **options)
        for kwargs in stream._kwargs:
            kwargs["bias"] = embeddings.sum()
        return first

    monkeypatch.setattr(stream, "_record", record)
    with pytest.raises(RspruneError, match="do not depend on the tokens"):
        list(stream.embed(token_ids(2, 8)))


@pytest.mark.shared
@pytest.mark.slow
def test_perplexity_of_the_real_model(smollm2: Path, shared_dir: Path):
    text = shared_dir / "data" / "wiki.test.raw"
    found = perplexity(smollm2, text, seq_len=512, windows=1, threads=1)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(text.read_text()[:20_000], add_special_tokens=False)["input_ids"][:512]
    loss = ordinary(smollm2)(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_tokenizer_of_the_tiny_models_gives_a_token_a_byte(tmp_path: Path, tiny_llama: Path):
    from rsprune.skeleton import load_tokenizer

    save_tokenizer(tmp_path)
    content = "naïve  text\n"
    tokenizer = load_tokenizer(tiny_llama)
    assert tokenizer(content)["input_ids"] == list(content.encode())
    assert tokenizer.eos_token_id == 256
