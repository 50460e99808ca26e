"""The layers of the compressed model, and the tensors of each.

A position is an ordinary layer of the dense model, some of its tensors changed, or a stand-in; maps
may follow it. A unit is a layer that stays with the stand-ins behind it: it is one output shard,
one line of the journal, and what a run that is gone on with does not do again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsprune import _core
from rsprune.checkpoint import TORCH_DTYPES, Checkpoint
from rsprune.depth.walk import Arguments, Walk
from rsprune.flexi.site import StandIn, built, map_module
from rsprune.layer_path import with_parameters
from rsprune.replaced import Block
from rsprune.skeleton import Skeleton
from rsprune.windows import Windows

NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""torch type -> what safetensors calls it."""


@dataclass
class Position:
    """One layer of the compressed model.

    Attributes:
        origin: the dense layer that it is or stands in for.
        block: how it differs from an ordinary one, its maps apart; a source is a dense layer.
        tensors: new or changed ones, as stored, by their names in the layer.
        maps: of each map behind it `lora_A.weight` and `lora_B.weight`.
    """

    origin: int
    block: Block = field(default_factory=Block)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    maps: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def ordinary(self) -> bool:
        """Whether its own forward is that of its class on its own weights."""
        return self.block.source is None and not self.block.ranks

    @property
    def whole_block(self) -> Block:
        """The block with its maps."""
        return self.block.model_copy(update={"maps": [len(m["lora_A.weight"]) for m in self.maps]})

    def all_tensors(self) -> dict[str, Tensor]:
        """`tensors` and those of the maps, by their names in the layer."""
        mapped = {
            f"maps.{place}.{leaf}": value
            for place, tensors in enumerate(self.maps)
            for leaf, value in tensors.items()
        }
        return {**self.tensors, **mapped}

    def advance(self, walk: Walk, kwargs: Arguments, source: Windows, target: Windows) -> None:
        """Runs it over all windows, as it is stored."""
        if self.ordinary:
            with walk.layer(self.origin) as layer:
                values = {name: value.float() for name, value in self.tensors.items()}
                walk.advance(with_parameters(layer, values), kwargs[self.origin], source, target)
        else:
            stand_in = StandIn("shared", self.block, self.tensors)
            with built(walk, self.origin, stand_in) as layer:
                walk.advance(layer, kwargs[self.origin], source, target)
        for tensors in self.maps:
            walk.advance(map_module(tensors), {}, target, target)

    def record(self) -> dict[str, Any]:
        """What a run that is gone on with must know beside the shard."""
        return {
            "origin": self.origin,
            "block": self.whole_block.model_dump(exclude_defaults=True),
            "tensors": sorted(self.tensors),
        }


def restored(shard: Path, skeleton: Skeleton, record: dict[str, Any], first: int) -> list[Position]:
    """The positions of a finished unit, with their tensors from its shard.

    Args:
        record: the unit's line in the journal.
        first: the number of its first position in the output.
    """
    stored = Checkpoint(shard.parent, {shard.name: _core.Shard(shard)})

    def load(number: int, origin: int, name: str) -> Tensor:
        info = stored.tensors[f"{prefix_of(skeleton, origin, number)}{name}"]
        tensor = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        stored.copy_to(info.name, tensor)
        return tensor

    positions = []
    for number, each in enumerate(record["positions"], start=first):
        origin, block = each["origin"], Block.model_validate(each["block"])
        tensors = {name: load(number, origin, name) for name in each["tensors"]}
        maps = [
            {leaf: load(number, origin, f"maps.{place}.{leaf}") for leaf in MAP_LEAVES}
            for place in range(len(block.maps))
        ]
        plain = block.model_copy(update={"maps": []})
        positions.append(Position(origin, plain, tensors, maps))
    return positions


MAP_LEAVES = ("lora_A.weight", "lora_B.weight")


def prefix_of(skeleton: Skeleton, origin: int, number: int) -> str:
    """What on-disk names of layer `number` of the output begin with: `model.layers.3.`."""
    for parameter, _ in skeleton.layers[origin].named_parameters():
        name = skeleton.disk_name(skeleton.layer_name(origin, parameter))
        if name is not None and name.endswith(f".{origin}.{parameter}"):
            return f"{name.removesuffix(f'{origin}.{parameter}')}{number}."
    return f"{skeleton.layer_prefix}.{number}."


def copied_names(skeleton: Skeleton, position: Position, number: int) -> dict[str, str]:
    """On-disk tensors of an ordinary position that are stored as they are -> their new names."""
    if not position.ordinary:
        return {}
    changed = {
        skeleton.disk_name(skeleton.layer_name(position.origin, name)) for name in position.tensors
    }
    return {
        name: renumbered(skeleton, name, number)
        for name in skeleton.checkpoint.tensors
        if skeleton.layer_of(name) == position.origin and name not in changed
    }


def new_tensors(skeleton: Skeleton, position: Position, number: int) -> dict[str, Tensor]:
    """What else is stored of a position, by on-disk name."""
    prefix, found = prefix_of(skeleton, position.origin, number), {}
    for name, value in position.all_tensors().items():
        known = position.ordinary and not name.startswith("maps.")
        old = skeleton.disk_name(skeleton.layer_name(position.origin, name)) if known else None
        found[prefix + name if old is None else renumbered(skeleton, old, number)] = value
    return found


def renumbered(skeleton: Skeleton, name: str, number: int) -> str:
    """An on-disk name of a layer's tensor, with another layer's number."""
    prefix = skeleton.layer_prefix.rpartition(".")[2]
    pattern = rf"(^|\.){re.escape(prefix)}\.\d+\."
    renamed, found = re.subn(pattern, rf"\g<1>{prefix}.{number}.", name, count=1)
    assert found == 1, name
    return renamed


def final_blocks(positions: Sequence[Position]) -> dict[int, Block]:
    """What config.json says: sources are positions of the output."""
    places = {each.origin: n for n, each in reversed(list(enumerate(positions))) if each.ordinary}
    blocks = {}
    for number, position in enumerate(positions):
        block = position.whole_block
        if block.source is not None:
            block = block.model_copy(update={"source": places[block.source]})
        if block != Block():
            blocks[number] = block
    return blocks
