"""Which tensors a GGUF file will hold, under which names and in which types."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsprune.checkpoint import Checkpoint, TensorInfo
from rsprune.errors import UsageError
from rsprune.gguf_models import Architecture, architecture_of, rope_factors
from rsprune.gguf_types import PLAIN, sizes
from rsprune.report import REPORT_NAME, load_report
from rsprune.skeleton import Skeleton

__all__ = ["Job", "Part", "make_job"]

ROPE_FACTORS = "rope_freqs.weight"
COMPUTED = ("rotary_emb.inv_freq",)
"""Ends of the names of tensors that old checkpoints hold and nobody reads."""


@dataclass(frozen=True)
class Part:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    source: str = ""
    """Its name on disk; empty for what is computed."""
    linear: bool = False
    """Whether it is the weight of a linear in a decoder layer."""
    heads: int = 0
    """If not 0, rows of so many heads are interleaved: (0, d/2, 1, d/2 + 1, ...)."""
    offset: float = 0.0
    """Added to the values."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file, padding left out."""
        values, nbytes = sizes(self.kind)
        return math.prod(self.shape) // values * nbytes


@dataclass(frozen=True)
class Job:
    """All that is known before the first byte is written."""

    skeleton: Skeleton
    architecture: Architecture
    kind: str
    parts: list[Part]
    factors: NDArray[np.float32] | None
    notes: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.parts)


def make_job(folder: Path, kind: str) -> Job:
    """Names, types and order of all tensors.

    Args:
        folder: a checkpoint.
        kind: type of the linears in decoder layers.

    Raises:
        UsageError: an architecture that is not supported, a tensor that has no place in it, or
            no linear whose rows are whole blocks of `kind`.
    """
    skeleton = Skeleton(Checkpoint.open(folder))
    architecture = architecture_of(skeleton.config, skeleton.model, folder)
    _refuse_leftovers(skeleton)
    kind_of = _kinds(skeleton, kind, _compressed(folder))
    parts = list(_parts(skeleton, architecture, kind_of))
    factors = rope_factors(skeleton.config)
    if factors is not None:
        parts.append(Part(ROPE_FACTORS, factors.shape, "F32"))
    return Job(skeleton, architecture, kind, parts, factors, _notes(parts, kind, folder))


def _refuse_leftovers(skeleton: Skeleton) -> None:
    used = {skeleton.disk_name(name) for name, _ in skeleton.model.named_parameters()}
    left = [
        name
        for name in skeleton.checkpoint.tensors
        if name not in used and not name.endswith(COMPUTED) and not skeleton.is_tied_copy(name)
    ]
    if left:
        listed = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        raise UsageError(f"{skeleton.checkpoint.folder}: tensors without a place in it: {listed}")


def _compressed(folder: Path) -> set[str] | None:
    """On-disk names of what rsprune compressed; None where it says nothing, and all count."""
    if not (folder / REPORT_NAME).exists():
        return None
    return {str(record["name"]) for record in load_report(folder).tensors} or None


def _kinds(
    skeleton: Skeleton, kind: str, compressed: set[str] | None
) -> Callable[[TensorInfo], str]:
    block = sizes(kind)[0]

    def kind_of(info: TensorInfo) -> str:
        if len(info.shape) < 2:
            return "F32"
        linear = skeleton.layer_of(info.name) is not None
        chosen = linear and (compressed is None or info.name in compressed)
        return kind if kind in PLAIN or (chosen and info.shape[1] % block == 0) else "F16"

    return kind_of


def _parts(
    skeleton: Skeleton, architecture: Architecture, kind_of: Callable[[TensorInfo], str]
) -> Iterator[Part]:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config, tensors = skeleton.config, skeleton.checkpoint.tensors
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture.gguf)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for parameter, _ in skeleton.model.named_parameters():
        info = tensors[skeleton.disk_name(parameter) or parameter]
        name = names.get_name(parameter, (".weight", ".bias"))
        if name is None:
            raise UsageError(f"{info.name}: llama.cpp's {architecture.gguf} has no such tensor")
        module = parameter.rpartition(".")[0].rpartition(".")[2]
        yield Part(
            name,
            info.shape,
            kind_of(info),
            info.name,
            linear=len(info.shape) == 2 and skeleton.layer_of(info.name) is not None,
            heads=heads.get(module, 0) if architecture.interleaved else 0,
            offset=architecture.norm_offset if module.endswith("norm") else 0.0,
        )


def _notes(parts: list[Part], kind: str, folder: Path) -> list[str]:
    """Says what is not stored in the type that was asked for."""
    block = sizes(kind)[0]
    linears = [part for part in parts if part.linear]
    others = [part for part in linears if part.kind != kind]
    if len(others) == len(linears):
        raise UsageError(
            f"{folder}: --type {kind} expects rows of whole blocks of {block}; found no compressed "
            "linear with such rows; --type F16 takes any"
        )
    narrow = [part for part in others if part.shape[1] % block]
    dense = [part for part in others if part.shape[1] % block == 0]
    widths = ", ".join(sorted({str(part.shape[1]) for part in narrow}))
    reasons = ((narrow, f"rows of {widths} are no whole blocks of {block}"), (dense, "left dense"))
    return [
        f"{len(some)} of {len(linears)} linears are F16 and not {kind}, {reason}: {_listed(some)}"
        for some, reason in reasons
        if some
    ]


def _listed(parts: list[Part]) -> str:
    return ", ".join(sorted({part.source.split(".")[-2] for part in parts}))
