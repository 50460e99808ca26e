"""What llama.cpp must be told of a model, and for which models it computes the same function.

Only classes whose every part is known are listed; a setting that llama.cpp would ignore is refused
by its name. What is checked against llama.cpp itself: benches/records.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsprune.errors import UsageError

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["ARCHITECTURES", "Architecture", "add_header", "architecture_of", "rope_factors"]


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp reads the tensors of one class of transformers."""

    gguf: str
    """Its name in llama.cpp."""
    interleaved: bool = False
    """Rotates neighbours: rows of q and k change places, (0, 1, ...) to (0, d/2, 1, ...)."""
    norm_offset: float = 0.0
    """Added to the weights of norms: transformers multiplies by `1 + weight`."""
    biases: tuple[str, ...] = ()
    """Linears that may have a bias."""
    activation: str = "silu"


ATTENTION = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LLAMA = Architecture("llama", interleaved=True, biases=(*ATTENTION, "o_proj", *MLP))

ARCHITECTURES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", biases=ATTENTION),
    "Qwen3ForCausalLM": Architecture("qwen3"),
}


def architecture_of(config: Any, model: Any, folder: Path) -> Architecture:
    """How to export `model`.

    Args:
        config: of the model.
        model: of transformers, on the meta device.
        folder: for messages.

    Raises:
        UsageError: the class, or a setting of it, has no counterpart in llama.cpp.
    """
    name = type(model).__name__
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UsageError(f"{folder}: GGUF export knows {known}; found {name}")
    found = ARCHITECTURES[name]
    _expect(config, "hidden_act", (found.activation,))
    kind = _rope(config).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        _refuse("rope_type", "default, linear or llama3", kind)
    partial = _rope(config).get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        _refuse("partial_rotary_factor", "1.0", partial)
    heads, width = config.num_attention_heads, _head_dim(config)
    if found.gguf == "qwen2" and heads * width != config.hidden_size:
        _refuse("head_dim", f"hidden_size / {heads} heads", width)
    for parameter, _ in model.named_parameters():
        linear = parameter.removesuffix(".bias")
        if linear != parameter and not linear.endswith(found.biases):
            raise UsageError(f"{parameter}: llama.cpp's {found.gguf} has no such bias")
    return found


def _expect(config: Any, name: str, expected: tuple[Any, ...]) -> None:
    if getattr(config, name) not in expected:
        _refuse(name, " or ".join(map(str, expected)), getattr(config, name))


def _refuse(name: str, expected: str, found: Any) -> None:
    raise UsageError(f"config.json: {name}: GGUF export expects {expected}, found {found!r}")


def _head_dim(config: Any) -> int:
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> dict[str, Any]:
    """Rotary settings; transformers 4 keeps them in two places."""
    together = getattr(config, "rope_parameters", None)
    if together is None:
        together = {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
    return {**together, "rope_type": together.get("rope_type", together.get("type", "default"))}


def _context_length(config: Any) -> int:
    """Positions for which llama.cpp computes what transformers does.

    It has no sliding windows for these classes; as long as a text is no longer than the window,
    there is none.
    """
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return min(longest, int(window)) if window and "sliding_attention" in kinds else longest


def add_header(writer: GGUFWriter, config: Any, architecture: Architecture) -> list[str]:
    """Adds the sizes and constants of the model to a file's header.

    Returns:
        Notes for the user: what the file says otherwise than config.json does.
    """
    context, width = _context_length(config), _head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if context == config.max_position_embeddings:
        return []
    return [
        f"context length {context}: the sliding window; llama.cpp's {architecture.gguf} has none"
    ]


def rope_factors(config: Any) -> NDArray[np.float32] | None:
    """What llama.cpp divides rotary frequencies by, one a pair of channels; None for ones only."""
    if _rope(config)["rope_type"] != "llama3":
        return None
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = _head_dim(config)
    # as transformers computes them, so that what is not scaled has a factor of exactly 1
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    plain = 1.0 / (_rope(config)["rope_theta"] ** exponents)
    factors: NDArray[np.float32] = (plain / scaled).numpy()
    return factors
