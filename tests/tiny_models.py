"""Tiny random models of the architectures that are supported, made from their own config classes.

They have all that their families are special for (grouped heads, fused projections, biases, soft
caps, sliding windows), weights large enough that every part of a layer changes the logits, and a
tokenizer with one token a byte.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rsprune.config import Config

VOCABULARY = 300
LAYERS = 3
EXTRA_TOKENS = ("<eos>", "<pad>")

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
HEADS = {"head_dim": 16}  # wider than hidden_size / heads: o_proj is not square
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SLIDING = {"sliding_window": 8, "query_pre_attn_scalar": 16}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 8, **HEADS}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", HEADS),
    "gemma2": ("Gemma2", {**HEADS, **SLIDING}),
    "gemma3": ("Gemma3", {**HEADS, **SLIDING, "sliding_window_pattern": 2}),
    "opt": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "opt_projected": (
        "OPT",
        {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5}),
    "phi3": ("Phi3", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {**HEADS, **EXPERTS, "mlp_only_layers": [1]}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 48}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
}
"""Name -> (prefix of the classes of transformers, what is not in `SIZES`)."""

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = [ATTENTION, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
OPT_GROUPS = [ATTENTION, ("self_attn.out_proj",), ("fc1",), ("fc2",)]


def _experts(count: int, gate: str, up: str, down: str) -> list[tuple[str, ...]]:
    names = [f"mlp.experts.{number}." for number in range(count)]
    pairs = (((f"{name}{gate}", f"{name}{up}"), (f"{name}{down}",)) for name in names)
    return [group for pair in pairs for group in pair]


ROUTED = _experts(6, "gate_proj", "up_proj", "down_proj")
SHARED = "mlp.shared_expert"
GROUPS = {
    **dict.fromkeys(KINDS, GATED),
    "mixtral": [*GATED[:2], *_experts(4, "w1", "w3", "w2")],
    "qwen3_moe": [*GATED[:2], *ROUTED],
    "olmoe": [*GATED[:2], *ROUTED[:8]],
    "qwen2_moe": [
        *GATED[:2],
        (f"{SHARED}.gate_proj", f"{SHARED}.up_proj", f"{SHARED}_gate"),
        (f"{SHARED}.down_proj",),
        *ROUTED,
    ],
    "opt": OPT_GROUPS,
    "opt_projected": OPT_GROUPS,
    "gpt_neox": [
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ],
    "phi3": [
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ],
}
"""What discovery must find: linears that share an input, in order of use."""


def groups_of(kind: str, layer: int) -> list[tuple[str, ...]]:
    """`GROUPS` in one decoder layer: an ordinary one among those with experts has no experts."""
    return GATED if layer in KINDS[kind][1].get("mlp_only_layers", ()) else GROUPS[kind]


@dataclass(frozen=True)
class Run:
    """A compressed tiny model."""

    model: Path
    out: Path
    config: Config


def build(kind: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, shards: int = 1) -> Path:
    """Writes a model and its tokenizer; the same bytes for the same arguments.

    Args:
        kind: a key of `KINDS`.
        folder: where to; made if it is not there.
        dtype: of the tensors on disk.
        shards: 1 for a single file, more for about that many files with an index.
    """
    model = make(kind).to(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = "1GB" if shards == 1 else f"{size // shards // 1000}KB"
    model.save_pretrained(folder, max_shard_size=limit)
    save_tokenizer(folder)
    return folder


def make(kind: str) -> Any:
    """The model in float32, in evaluation mode."""
    import transformers

    family, options = KINDS[kind]
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(**{**SIZES, **options})
    torch.manual_seed(sum(kind.encode()))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 3:  # fused experts
            parameter.normal_(0.0, parameter.shape[2] ** -0.5)
        elif parameter.dim() == 2:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5)
        else:
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: token = byte, then the extra tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = bytes_to_unicode()
    vocabulary = {symbols[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(EXTRA_TOKENS))
    eos, pad = EXTRA_TOKENS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad)
    fast.save_pretrained(folder)


def token_ids(count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [count, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count, length), generator=generator)


def ordinary(folder: Path) -> Any:
    """The model as transformers itself loads it, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by name."""
    from safetensors.torch import load_file

    files = (load_file(path) for path in sorted(folder.glob("*.safetensors")))
    return {name: tensor for file in files for name, tensor in file.items()}
