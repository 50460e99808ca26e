"""A random checkpoint of a named shape, written shard by shard: for memory, not for perplexity.

    python benches/python/make_checkpoint.py llama-3-8b DIR [--layers 4]

One shard a decoder layer and one for the rest, bfloat16, weights of the usual size, and a tokenizer
with one token a byte. No more than one tensor is in memory.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rsprune import _core
from rsprune.experts import unfuse

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-1b": ("Llama", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 128256, "tie_word_embeddings": True,
    }),
    "llama-3-8b": ("Llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "tie_word_embeddings": False,
    }),
    "qwen3-30b-a3b": ("Qwen3Moe", {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "vocab_size": 151936, "tie_word_embeddings": False,
    }),
}  # fmt: skip
"""Name -> (prefix of the classes of transformers, its published sizes)."""
COMMON = {"max_position_embeddings": 8192, "bos_token_id": 256, "eos_token_id": 256}


def write(name: str, folder: Path, layers: int | None) -> None:
    """Writes the checkpoint; `layers` cuts it short."""
    family, sizes = SHAPES[name]
    sizes = {**sizes, **({"num_hidden_layers": layers} if layers else {})}
    config = getattr(transformers, f"{family}Config")(**COMMON, **sizes)
    config.architectures = [f"{family}ForCausalLM"]
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        unfuse(model.model.layers, "model.layers")  # on disk there is one matrix an expert
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shards: dict[str, list[tuple[str, torch.Size]]] = defaultdict(list)
    for parameter, value in model.named_parameters():
        layer = parameter.split(".layers.")
        number = int(layer[1].split(".")[0]) + 1 if len(layer) == 2 else 0
        shards[f"model-{number:05d}.safetensors"].append((parameter, value.shape))
    weight_map = {}
    for seed, (file, tensors) in enumerate(sorted(shards.items())):
        write_shard(folder / file, tensors, np.random.default_rng(seed))
        weight_map |= {parameter: file for parameter, _ in tensors}
        print(file, flush=True)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_tokenizer(folder)


def write_shard(
    path: Path, tensors: list[tuple[str, torch.Size]], generator: np.random.Generator
) -> None:
    """One file, tensor after tensor."""
    plan = [(name, "BF16", list(shape)) for name, shape in tensors]
    writer = _core.ShardWriter(path, plan, {"format": "pt"})
    for name, shape in tensors:
        value = torch.ones(shape)
        if len(shape) == 2:
            scale = shape[1] ** -0.5
            noise = generator.standard_normal(shape, dtype=np.float32)
            value = torch.from_numpy(noise).mul_(scale)
        bits = value.to(torch.bfloat16).view(torch.uint8).reshape(-1).numpy()
        writer.put(name, bits)
    writer.finish()


def save_tokenizer(folder: Path) -> None:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = bytes_to_unicode()
    vocabulary = {symbols[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    args = parser.parse_args()
    write(args.shape, args.folder, args.layers)


if __name__ == "__main__":
    main()
