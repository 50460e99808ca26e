"""The model without its weights: structure on `meta`, tensors brought in piece by piece.

A skeleton is the model class of transformers with every parameter on `meta`. Its own forward is
run for the parts before and after the decoder layers, with the layers replaced by recorders that
hand their input through; so masks, rotary embeddings and scalings are always the model's own.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rsprune.checkpoint import FLOATS, TORCH_DTYPES, Checkpoint, TensorInfo
from rsprune.errors import UsageError
from rsprune.experts import ExpertLinear, Experts, unfuse
from rsprune.guard import refusing, refusing_panics
from rsprune.model_config import check_model, parameters_registered_by, read_config
from rsprune.pool import TensorPool
from rsprune.replaced import read_blocks
from rsprune.replaced_layers import install
from rsprune.stored import StoredLinear, keep_stored

if TYPE_CHECKING:
    from torch import Tensor


def _on_meta(name: str, parameter: nn.Parameter) -> nn.Parameter:
    """New parameters go to `meta`; buffers stay real (rotary frequencies are computed once)."""
    if parameter.device.type == "meta":
        return parameter
    return nn.Parameter(parameter.to("meta"), requires_grad=False)


class Skeleton:
    """Structure of one checkpoint.

    Args:
        checkpoint: the tensors on disk.
        device: where materialised parts live: cpu, cuda, or auto.
        trust_remote_code: whether code in the model's folder may run.

    Raises:
        UsageError: unknown architecture, or tensors that the architecture needs are missing.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, device: str = "cpu", trust_remote_code: bool = False
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(resolve_device(device))
        self.pool = TensorPool(self.device)
        self.config = read_config(checkpoint.folder, trust_remote_code)
        with refusing(f"{checkpoint.folder}: no causal language model"):
            where = checkpoint.folder / "config.json"
            check_model(self.config, checkpoint.tensors, where, trust_remote_code)
            with parameters_registered_by(_on_meta):
                model = AutoModelForCausalLM.from_config(
                    self.config, dtype=torch.float32, trust_remote_code=trust_remote_code
                )
        self.model: Any = model.eval().requires_grad_(False)
        for buffered in self.model.modules():
            for name, buffer in buffered._buffers.items():
                if buffer is not None:
                    buffered._buffers[name] = buffer.to(self.device)
        self.layer_prefix, self.layers = decoder_layers(self.model)
        self.blocks = read_blocks(checkpoint.folder, len(self.layers))
        with refusing(f"{checkpoint.folder}: config.json"):
            install(self.layers, self.blocks, tied=True)
        unfuse(self.layers, self.layer_prefix)
        keep_stored(self.layers)
        self._tied = _tied_names(self.model)
        self._renamed = renamed(self.model, checkpoint.tensors)
        self._disk_names = {name: disk_name for disk_name, name in self._renamed.items()}
        if missing := self.missing():
            raise MissingTensorsError(missing, checkpoint.folder)
        self._check_tensors()

    def refuse_replaced(self) -> None:
        """Raises `UsageError` where layers share weights: they are no layers to compress again."""
        if self.blocks:
            names = ", ".join(map(str, sorted(self.blocks)))
            raise UsageError(
                f"{self.checkpoint.folder}: has layers that are replaced ({names}); expected "
                "ordinary ones, as of rsprune export --dense"
            )

    def _check_tensors(self) -> None:
        """Refuses tensors that are not what the parameters of the model are, and broken buffers."""
        for name, parameter in self.model.named_parameters():
            info = self.checkpoint.tensors[self.disk_name(name) or name]
            if info.shape != tuple(parameter.shape):
                expected = f"expected shape {list(parameter.shape)} from config.json"
                raise UsageError(f"{info.name}: {expected}, found {list(info.shape)}")
            if info.dtype not in ("F64", *FLOATS):
                expected = ", ".join(("F64", *FLOATS))
                raise UsageError(f"{info.name}: expected dtype {expected}, found {info.dtype}")
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point() and bool((buffer.isnan() | buffer.isposinf()).any()):
                raise UsageError(f"config.json: gives no finite values for the buffer {name}")

    def missing(self) -> list[str]:
        """Names of the parameters that no tensor on disk provides."""
        names = (name for name, _ in self.model.named_parameters())
        return [name for name in names if self.disk_name(name) is None]

    def disk_name(self, name: str) -> str | None:
        """The on-disk name of the parameter `name`; None if no tensor provides it."""
        tied = next((names for names in self._tied if name in names), [])
        for alias in (name, *tied):
            found = self._find(alias)
            if found is not None:
                return found
        return None

    def _find(self, name: str) -> str | None:
        """`name` as the disk has it: with or without the base model's prefix, or renamed."""
        prefix = f"{self.model.base_model_prefix}."
        forms = (name, name.removeprefix(prefix), prefix + name)
        candidates = (*forms, *(self._disk_names.get(form) for form in forms))
        return next((c for c in candidates if c in self.checkpoint.tensors), None)

    def layer_name(self, index: int, name: str) -> str:
        """The full parameter name of `name` inside of decoder layer `index`."""
        return f"{self.layer_prefix}.{index}.{name}"

    def layer_of(self, disk_name: str) -> int | None:
        """The decoder layer of the model that an on-disk tensor belongs to, or None."""
        base = f"{self.model.base_model_prefix}."
        name = self._renamed.get(disk_name, disk_name)
        layers = {str(index): index for index in range(len(self.layers))}
        for prefix in (self.layer_prefix, self.layer_prefix.removeprefix(base)):
            head, found, rest = name.partition(f"{prefix}.")
            index = rest.partition(".")[0]
            if found and head in ("", base) and index in layers:
                return layers[index]
        return None

    def load(self, name: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Parameter `name` on the device, in a buffer of the pool; None keeps its stored type."""
        info = self._info(name)
        tensor = self.pool.take(torch.Size(info.shape), dtype or TORCH_DTYPES[info.dtype])
        self.checkpoint.copy_to(info.name, tensor)
        return tensor

    def stored(self, name: str) -> Tensor:
        """Parameter `name` as it is stored, in memory of its own."""
        return self.checkpoint.read(self._info(name).name)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type that parameter `name` has on disk."""
        return TORCH_DTYPES[self._info(name).dtype]

    def _info(self, name: str) -> TensorInfo:
        """What the disk says of parameter `name`, its shape checked."""
        disk_name = self.disk_name(name)
        if disk_name is None:
            raise MissingTensorsError([name], self.checkpoint.folder)
        info = self.checkpoint.tensors[disk_name]
        expected = tuple(self.model.get_parameter(name).shape)
        if info.shape != expected:
            message = f"{disk_name}: expected shape {list(expected)} from config.json"
            raise UsageError(f"{message}, found {list(info.shape)}")
        return info

    @contextlib.contextmanager
    def materialised(self, names: list[str]) -> Iterator[None]:
        """Holds the parameters `names` in memory for the length of the block."""
        shared: dict[int, nn.Parameter] = {}
        held = []
        for name in names:
            module, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(module)
            empty = owner._parameters[leaf]
            if id(empty) not in shared:
                shared[id(empty)] = nn.Parameter(self.load(name), requires_grad=False)
            owner._parameters[leaf] = shared[id(empty)]
            held.append((owner, leaf, empty))
        try:
            yield
        finally:
            for owner, leaf, empty in held:
                owner._parameters[leaf] = empty
            # Not given back to the pool: the vocabulary is large and not needed again soon.

    def outer_names(self) -> list[str]:
        """Parameters outside of the decoder layers, without the two vocabulary matrices."""
        vocabulary = {id(self.model.get_input_embeddings().weight)}
        if self.model.get_output_embeddings() is not None:
            vocabulary.add(id(self.model.get_output_embeddings().weight))
        outside = _named_parameters(self.model)
        return [
            name
            for name, parameter in outside
            if not name.startswith(f"{self.layer_prefix}.") and id(parameter) not in vocabulary
        ]

    @property
    def channels(self) -> int:
        """Channels of the hidden states between decoder layers."""
        return int(self.config.get_text_config().hidden_size)

    def beyond_context(self, tokens: int) -> str | None:
        """What is to be said of windows that are longer than the model was made for."""
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(longest, int) or not 0 < longest < tokens:
            return None
        return f"windows of {tokens} tokens: the model was made for {longest} positions"

    def has_position_table(self) -> bool:
        """Whether positions are looked up: an embedding has a row for each, and a few before."""
        longest = self.config.get_text_config().max_position_embeddings
        return any(
            isinstance(module, nn.Embedding) and 0 <= module.num_embeddings - longest <= 8
            for name, module in self.model.named_modules()
            if not name.startswith(f"{self.layer_prefix}.")
            and module is not self.model.get_input_embeddings()
        )

    def expert_share(self, index: int) -> float:
        """Of all tokens, those that an expert of layer `index` sees on average."""
        lists = [m for m in self.layers[index].modules() if isinstance(m, Experts)]
        if not lists:
            return 1.0
        return float(self.config.get_text_config().num_experts_per_tok) / len(lists[0])

    def is_tied_copy(self, disk_name: str) -> bool:
        """Whether an on-disk tensor repeats, bit for bit, one that the model ties it to."""
        for names in self._tied:
            on_disk = [found for name in names if (found := self._find(name)) is not None]
            if disk_name in on_disk[1:]:
                return self.checkpoint.same(disk_name, on_disk[0])
        return False

    def name_of(self, module: nn.Module) -> str:
        """The name of `module` inside of the model."""
        names: Iterator[str] = (n for n, found in self.model.named_modules() if found is module)
        return next(names)

    def load_layer(self, index: int) -> None:
        """Brings decoder layer `index` into memory; weights of experts stay on the disk."""
        layer = self.layers[index]
        for name, _ in list(layer.named_parameters()):
            module, _, leaf = name.rpartition(".")
            owner, full_name = layer.get_submodule(module), self.layer_name(index, name)
            if isinstance(owner, ExpertLinear):
                info = self._info(full_name)
                owner.lend(_Source(self.checkpoint, info.name), TORCH_DTYPES[info.dtype])
                continue
            kept = isinstance(owner, StoredLinear) and leaf == "weight"
            tensor = self.load(full_name, None if kept else torch.float32)
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def layer_bytes(self) -> int:
        """Memory that a decoder layer takes: of every shape and type, the most that one needs."""
        most: Counter[tuple[tuple[int, ...], int]] = Counter()
        for index, layer in enumerate(self.layers):
            most |= Counter(self._buffers(index, layer))
        return sum(math.prod(shape) * size * count for (shape, size), count in most.items())

    def attention_bytes(self, tokens: int) -> int:
        """Scores of a window's attention, masked and normalised, where a class holds them whole."""
        config = self.config.get_text_config()
        if getattr(config, "_attn_implementation", None) != "eager":
            return 0
        return 3 * 4 * tokens**2 * int(config.num_attention_heads)

    def _buffers(self, index: int, layer: nn.Module) -> Iterator[tuple[tuple[int, ...], int]]:
        """Shape and bytes an element of what the pool lends for a layer; experts need none."""
        for prefix, module in layer.named_modules():
            if isinstance(module, ExpertLinear):
                continue
            for leaf, parameter in module.named_parameters(recurse=False):
                size = 4
                if isinstance(module, StoredLinear) and leaf == "weight":
                    info = self._info(self.layer_name(index, f"{prefix}.{leaf}"))
                    size = TORCH_DTYPES[info.dtype].itemsize
                yield tuple(parameter.shape), size

    def drop_layer(self, index: int) -> None:
        """Puts decoder layer `index` back on `meta`."""
        for module in self.layers[index].modules():
            if isinstance(module, ExpertLinear):
                module.lend(None, torch.float32)
                continue
            for leaf, parameter in module._parameters.items():
                if parameter is not None and parameter.device.type != "meta":
                    empty = torch.empty_like(parameter, device="meta", dtype=torch.float32)
                    module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
                    self.pool.give_back(parameter.data)


class _Source:
    """Reads one tensor of a checkpoint; copies of a layer share it."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint = checkpoint
        self._name = name

    def __call__(self, dtype: torch.dtype | None) -> Tensor:
        return self._checkpoint.read(self._name, dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Source:
        return self


def resolve_device(name: str) -> str:
    """Where passes run: `auto` is cuda where torch finds one, else cpu.

    Raises:
        UsageError: cuda was asked for and is not there.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name == "cuda" and not available:
        raise UsageError("option device: cuda was asked for, but torch finds no CUDA device")
    return name


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint; raises `UsageError` where it has none."""
    with refusing_panics(f"{folder}: no tokenizer could be loaded"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def missing_tensors(folder: Path) -> list[str]:
    """Parameters that the model of `folder` would initialise at random for want of a tensor."""
    checkpoint = Checkpoint.open(folder)
    try:
        return Skeleton(checkpoint).missing()
    except MissingTensorsError as error:
        return error.names


class MissingTensorsError(UsageError):
    """Tensors that the architecture needs are not on disk."""

    def __init__(self, names: list[str], folder: Path) -> None:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        super().__init__(f"{folder}: the architecture needs tensors that no shard holds: {shown}")
        self.names = names


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest ModuleList that lies in no other one (experts lie in a layer)."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(f"{outer}.") for outer, _ in lists
        ):
            lists.append((name, module))
    longest = max(lists, key=lambda item: len(item[1]), default=("", nn.ModuleList()))
    if not len(longest[1]):
        raise UsageError(f"{type(model).__name__}: found no list of decoder layers")
    return longest


def renamed(model: nn.Module, disk_names: Iterable[str]) -> dict[str, str]:
    """On-disk name -> parameter name, where transformers 5 renames a tensor that it loads."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # transformers 4: the names are the same
        return {}
    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    renamed = {}
    for disk_name in disk_names:
        name = disk_name
        for rule in rules:
            name, _ = rule.rename_source_key(name)
        if name != disk_name:
            renamed[disk_name] = name
    return renamed


def _tied_names(model: nn.Module) -> list[list[str]]:
    """The names of every parameter that has more than one, the first one first."""
    names: dict[int, list[str]] = {}
    for name, parameter in _named_parameters(model):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]
