"""How transformers loads and saves packed folders, once rsprune is imported.

Registered are a configuration (the `quantization_config` section) and a quantizer, which swaps the
packed linears of the empty model for `PackedLinear`. Their parameters carry the names on disk, so
that transformers itself reads and writes them. Fused experts are unfused for that.

What could end in random weights is refused before: every part of every packed linear must be in the
files with its type and shape, and every packed linear must be a linear of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rsprune import _core
from rsprune.checkpoint import TORCH_DTYPES, Checkpoint
from rsprune.errors import RspruneError, UsageError
from rsprune.experts import FUSED, ExpertLinear, unfuse
from rsprune.packed_linear import PackedLinear
from rsprune.packing import METHOD, PackedWeight, linear_of, packed_weights
from rsprune.skeleton import decoder_layers, renamed


def load(folder: str | Path, *, dequantize: bool = False, **options: Any) -> Any:
    """A causal language model of transformers, from a packed folder.

    Args:
        folder: a folder with packed linears, or a hub id.
        dequantize: whether the packed linears become ordinary ones: an ordinary model, which may
            be trained and which `save_pretrained` writes as an ordinary checkpoint.
        options: for `AutoModelForCausalLM.from_pretrained`; `dtype` is "auto" unless given.

    Raises:
        UsageError: the folder is not what its config.json says.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **options})
    if dequantize and getattr(model, "is_quantized", False):
        return model.dequantize()
    return model


@register_quantization_config(METHOD)
class RspruneConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` section; see `rsprune.packing`.

    Raises:
        UsageError: an entry is malformed, or the version is not ours.
    """

    def __init__(self, **settings: Any) -> None:
        settings.pop("quant_method", None)
        self.quant_method = METHOD
        try:
            self._packed = packed_weights(settings)
        except ValueError as error:
            raise UsageError(f"config.json: quantization_config: {error}") from None
        self.blocks: Any = settings.pop("blocks", {})
        self.__dict__.update(settings)

    @property
    def packed(self) -> dict[str, PackedWeight]:
        """How weights are packed, by their names on disk."""
        return self._packed

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives linears other names, under which the model will be saved."""
        for part in ("linears", "dense"):
            entry = {names.get(name, name): value for name, value in getattr(self, part).items()}
            setattr(self, part, entry)
        self._packed = packed_weights(self.__dict__)

    def to_dict(self) -> dict[str, Any]:
        """The section as config.json holds it."""
        shown = {key: value for key, value in self.__dict__.items() if not key.startswith("_")}
        if not self.blocks:
            del shown["blocks"]
        return shown


@register_quantizer(METHOD)
class RspruneQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `PackedLinear` in the place of packed linears."""

    requires_calibration = True  # weights are packed by `rsprune compress`, not while they load

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Everything that is needed came with rsprune."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        self._checkpoint = _open(checkpoint_files or _files_of(model), config.packed)
        _install_blocks(model, config.blocks, self._checkpoint)
        self._linears: dict[str, PackedLinear] = {}
        fused = any(type(module).__name__ in FUSED for module in model.modules())
        if fused and any(".experts." in name for name in config.packed):
            prefix, layers = decoder_layers(model)
            unfuse(layers, prefix)
        for name, packed in config.packed.items():
            module_name = _module_name(model, linear_of(name))
            linear = model.get_submodule(module_name)
            if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != packed.shape:
                raise UsageError(
                    f"{linear_of(name)}: expected a linear of {list(packed.shape)} as config.json "
                    f"says it is packed, found {linear} in the model"
                )
            replaced = PackedLinear(packed, linear.bias, config.compute)
            model.set_submodule(module_name, replaced)
            self._linears[name] = replaced
        for name, module in model.named_modules():
            if isinstance(module, ExpertLinear):
                raise UsageError(f"{name}: expected all experts to be packed, or none")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Parts that transformers has cast with the rest of the model are read as they are."""
        for name, linear in self._linears.items():
            loaded = linear.parts
            if any(part.device.type == "meta" for part in loaded.values()):
                raise RspruneError(f"{linear_of(name)}: transformers has not loaded its parts")
            stored = {part: TORCH_DTYPES[dtype] for part, dtype, _ in linear.packed.layout}
            if any(value.dtype != stored[part] for part, value in loaded.items()):
                linear.set_parts(self._checkpoint.parts(name))
            for part in linear.parts.values():
                part.requires_grad_(False)  # transformers gives a new parameter for what it loads
        self.quantization_config.rename(_saved_names(model, self._linears))
        del self._checkpoint
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                model.set_submodule(name, _dense(module, model.get_input_embeddings().weight.dtype))
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Parts are saved under the names that they were loaded by."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed linears have no gradients; adapters of shared layers do."""
        return not self.quantization_config.packed


def _install_blocks(model: Any, blocks: Any, checkpoint: Checkpoint) -> None:
    """Makes the layers of an empty model what `quantization_config` says; see `rsprune.flexi`."""
    from rsprune.replaced import parse_blocks
    from rsprune.replaced_layers import install
    from rsprune.skeleton import decoder_layers

    prefix, layers = decoder_layers(model)
    try:
        parsed = parse_blocks(blocks, len(layers))
        install(layers, parsed, tied=False)
    except ValueError as error:
        raise UsageError(f"config.json: quantization_config: {error}") from None
    renames, base = renamed(model, checkpoint.tensors), f"{model.base_model_prefix}."
    known = {renames.get(name, name) for name in checkpoint.tensors}
    for index in parsed:
        for name, _ in layers[index].named_parameters():
            full = f"{prefix}.{index}.{name}"
            if not known & {full, full.removeprefix(base), base + full}:
                raise UsageError(f"{full}: expected by config.json, found no such tensor")


def _files_of(model: Any) -> list[str]:
    """The files that transformers 4 loads, which it does not tell: by now they are all here."""
    folder = Path(model.name_or_path)
    if not folder.is_dir():
        from transformers.utils import cached_file

        revision = getattr(model.config, "_commit_hash", None)
        config = cached_file(
            model.name_or_path, "config.json", revision=revision, local_files_only=True
        )
        folder = Path(config).parent
    return [str(folder / file) for file in sorted(set(_core.checkpoint_index(folder).values()))]


def _open(files: Sequence[str], packed: dict[str, PackedWeight]) -> Checkpoint:
    """The files that the model is loaded from; refuses them where a part is missing."""
    paths = [Path(file) for file in files]
    if any(path.suffix != ".safetensors" for path in paths):
        raise UsageError(f"{paths[0]}: expected packed linears in safetensors files")
    return Checkpoint(paths[0].parent, {path.name: _core.Shard(path) for path in paths}, packed)


def _module_name(model: Any, linear: str) -> str:
    """What a linear on disk is called in the model.

    Raises:
        UsageError: the model has no such module.
    """
    modules = {name for name, _ in model.named_modules()}
    for name in _forms(model, linear):
        if name in modules:
            return name
    raise UsageError(
        f"{linear}: packed as config.json says, but {type(model).__name__} has no such linear"
    )


def _saved_names(model: Any, linears: Mapping[str, PackedLinear]) -> dict[str, str]:
    """Linears of which `save_pretrained` writes the base model's prefix and the checkpoint did not
    have it, or the other way round: name in the checkpoint -> name that will be written."""
    prefix, found = f"{model.base_model_prefix}.", {}
    names = {id(module): name for name, module in model.named_modules()}
    for weight, linear in linears.items():
        before, now = linear_of(weight), names[id(linear)]
        renamed_to = next(_forms(model, before))
        if now == prefix + renamed_to:
            found[before] = prefix + before
        elif now != renamed_to:
            found[before] = before.removeprefix(prefix)
    return found


def _forms(model: Any, name: str) -> Iterator[str]:
    """`name` as transformers 5 renames it, with and without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    name = linear_of(renamed(model, [f"{name}.weight"]).get(f"{name}.weight", name))
    yield name
    yield name.removeprefix(prefix)
    yield prefix + name


def _dense(packed: PackedLinear, dtype: torch.dtype) -> nn.Linear:
    """An ordinary linear with the weight of a packed one."""
    has_bias = packed.bias is not None
    linear = nn.Linear(packed.in_features, packed.out_features, bias=has_bias, device="meta")
    linear.weight = nn.Parameter(packed.weight.to(dtype))
    if packed.bias is not None:
        linear.bias = packed.bias
    return linear.train(packed.training)
