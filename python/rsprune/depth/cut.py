"""config.json and tensor names of a model that has lost some of its decoder layers.

    num_hidden_layers   what is left (under whatever name the class keeps it)
    per-layer lists     `layer_types`, `no_rope_layers`, lists of windows and widths: their entries
                        go with the layers
    lists of numbers    `mlp_only_layers` and its kin name layers: they are numbered anew
    counts              `first_k_dense_replace`, `max_window_layers`: layers at the start that stay
    tensor names        ...layers.7... -> ...layers.5...

A class that leaves `layer_types` out of the file works them out from the layers' numbers; those of
the dense model are then written down. Whether that is right is not believed but tried: the model is
built on `meta` anew, and each of its layers compared with the one it stands for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rsprune.errors import UsageError
from rsprune.guard import refusing
from rsprune.skeleton import Skeleton, decoder_layers

COUNTS_OF_ALL = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
COUNTS_FROM_START = ("first_k_dense_replace", "max_window_layers")
NUMBERS = ("mlp_only_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices")
"""Lists of layer numbers."""

NOT_PER_LAYER = re.compile(r"architectures|.*_(token_)?ids?|.*_tokens|.*_factor|.*_section")
"""Lists that may be as long as there are layers, and have nothing to do with them."""

EXPLICIT = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists that some classes work out from the numbers of layers."""


def cut_config(
    content: Mapping[str, Any],
    skeleton: Skeleton,
    kept: Sequence[int],
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The content of config.json for the layers `kept`.

    Args:
        content: of the dense model's config.json.
        skeleton: the dense model.
        kept: numbers of its layers, in order.
        trust_remote_code: whether code that lies in the model's folder may run.

    Raises:
        UsageError: the cut model would be another one; naming the layer and what differs.
    """
    layers, text = len(skeleton.layers), skeleton.config.get_text_config()
    worked_out = {name: getattr(text, name, None) for name in EXPLICIT}
    lists = {name: v for name, v in worked_out.items() if isinstance(v, list) and len(v) == layers}
    cut = _cut(content, kept, layers, lists)
    cut.pop("quantization_config", None)  # packed weights are lent, and stored, as dense ones
    _check(cut, skeleton, kept, trust_remote_code)
    return cut


def _cut(
    content: Mapping[str, Any], kept: Sequence[int], layers: int, lists: Mapping[str, list[Any]]
) -> dict[str, Any]:
    """`content` for the layers `kept`; `lists` go where the number of layers stands."""
    counts = any(content.get(name) == layers for name in COUNTS_OF_ALL)
    cut: dict[str, Any] = {}
    for key, value in {**content, **(lists if counts else {})}.items():
        if key in COUNTS_OF_ALL and value == layers:
            value = len(kept)
        elif key in COUNTS_FROM_START and isinstance(value, int):
            value = sum(index < value for index in kept)
        elif key in NUMBERS and isinstance(value, list):
            value = [new for new, old in enumerate(kept) if old in value]
        elif isinstance(value, list) and len(value) == layers and not NOT_PER_LAYER.fullmatch(key):
            value = [value[index] for index in kept]
        elif isinstance(value, dict):
            value = _cut(value, kept, layers, lists)
        cut[key] = value
    return cut


def _check(
    content: dict[str, Any], skeleton: Skeleton, kept: Sequence[int], trust_remote_code: bool
) -> None:
    """Builds the cut model on `meta` and compares every layer with the one it stands for."""
    where = f"{skeleton.checkpoint.folder / 'config.json'} without the removed layers"
    with refusing(where), torch.device("meta"):
        config = type(skeleton.config).from_dict(content)
        models = [
            AutoModelForCausalLM.from_config(each, trust_remote_code=trust_remote_code)
            for each in (config, skeleton.config)
        ]
    new_layers, old_layers = (decoder_layers(model)[1] for model in models)
    if len(new_layers) != len(kept):
        raise UsageError(f"{where}: expected {len(kept)} layers, found {len(new_layers)}")
    for new, old in enumerate(kept):
        expected, found = _facts(old_layers[old]), _facts(new_layers[new])
        differing = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
        if differing:
            key = differing[0]
            raise UsageError(
                f"{where}: layer {new} must be what layer {old} was, expected {key} "
                f"{expected.get(key)!r}, found {found.get(key)!r}: this architecture makes its "
                "layers by their numbers"
            )


def _facts(layer: nn.Module) -> dict[str, Any]:
    """What tells one layer from another: shapes, classes and plain settings."""
    facts: dict[str, Any] = {name: list(p.shape) for name, p in layer.named_parameters()}
    for name, module in layer.named_modules():
        facts[f"{name} class"] = type(module).__name__
        for key, value in vars(module).items():
            number = key in ("layer_idx", "layer_id", "layer_index", "layer_number")
            if isinstance(value, (str, int, float, bool)) and not number:
                facts[f"{name}.{key}"] = value
    return facts


def new_names(skeleton: Skeleton, kept: Sequence[int]) -> dict[int | None, dict[str, str]]:
    """New layer number (None: outside of the layers) -> on-disk name -> name in the output.

    Layers that config.json does not count (such as heads that predict further tokens) follow the
    last one, and move with it.
    """
    layers, places = len(skeleton.layers), {old: new for new, old in enumerate(kept)}
    found: dict[int | None, dict[str, str]] = {None: {}, **{new: {} for new in range(len(kept))}}
    prefix = skeleton.layer_prefix.rpartition(".")[2]
    number = re.compile(rf"(^|.*?\.){re.escape(prefix)}\.(\d+)\.")
    for name in skeleton.checkpoint.tensors:
        old = skeleton.layer_of(name)
        match = number.match(name)
        if old is None and match is not None and int(match[2]) >= layers:
            new: int | None = int(match[2]) - layers + len(kept)
            found[None][name] = name[: match.start(2)] + str(new) + name[match.end(2) :]
        elif old is None:
            if not skeleton.is_tied_copy(name):
                found[None][name] = name
        elif old in places:
            assert match is not None  # a layer's tensors stand under its number
            new = places[old]
            found[new][name] = name[: match.start(2)] + str(new) + name[match.end(2) :]
    return found
