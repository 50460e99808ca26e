"""What config.json says of layers that are no ordinary ones.

    "quantization_config": {"quant_method": "rsprune", ..., "blocks": {
        "7": {"source": 5, "ranks": {"self_attn.o_proj": 64, ...}, "gains": ["self_attn.o_proj"]},
        "8": {"ranks": {"self_attn.q_proj": 64, ...}},
        "3": {"maps": [64]}
    }}

Numbers are those of the layers of this folder. What is not said of a layer is as in its class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    model_validator,
)

from rsprune.errors import UsageError


class Block(BaseModel):
    """How one layer differs from its class.

    Attributes:
        source: the layer whose linears' weights it runs; None for weights of its own.
        ranks: linear -> rank of its adapter; without `source`, of the factors in its place.
        gains: linears whose shared weight's output is scaled by channel; only with `source`.
        maps: ranks of the linear maps behind the layer, in the order in which they are applied.
        normalised: whether the layer's output is normalised and scaled, as published.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: int | None = Field(default=None, ge=0)
    ranks: dict[str, int] = {}
    gains: list[str] = []
    maps: list[int] = []
    normalised: bool = False

    @model_validator(mode="after")
    def _sizes(self) -> Block:
        if any(not 1 <= rank <= 2**16 for rank in (*self.ranks.values(), *self.maps)):
            raise ValueError("ranks: expected 1 to 65536")
        if self.gains and self.source is None:
            raise ValueError("gains: are for layers with a source")
        return self

    @field_serializer("ranks")
    def _sorted(self, ranks: dict[str, int]) -> dict[str, int]:
        """One order, whether they were just chosen or read back by a run that goes on."""
        return dict(sorted(ranks.items()))


Blocks = Mapping[int, Block]
"""Layer -> how it differs; layers that are not in it are ordinary."""


def parse_blocks(given: Any, layers: int) -> dict[int, Block]:
    """The entry `blocks` of a `quantization_config`.

    Raises:
        ValueError: naming the layer, what was expected and what was found.
    """
    if not isinstance(given, dict):
        raise ValueError(f"blocks: expected an object, found {given!r}")
    blocks = {}
    for key, value in given.items():
        if not key.isdecimal() or not int(key) < layers:
            raise ValueError(f"blocks: expected layers below {layers}, found {key!r}")
        try:
            block = Block.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"blocks: layer {key} {where}: {first['msg']}") from None
        blocks[int(key)] = block
    for index, block in blocks.items():
        source = block.source
        if source is None:
            continue
        other = blocks.get(source, Block())
        if source >= layers or other.ranks or other.source is not None:
            raise ValueError(
                f"blocks: layer {index}: expected an ordinary layer as source, found {source}"
            )
    return blocks


def read_blocks(folder: Path, layers: int) -> dict[int, Block]:
    """What the config.json of a folder says of its blocks; empty where it says nothing.

    Raises:
        UsageError: the entry is malformed.
    """
    try:
        return parse_blocks(_entry(folder), layers)
    except ValueError as error:
        raise UsageError(f"{folder / 'config.json'}: quantization_config: {error}") from None


def says_blocks(folder: Path) -> bool:
    """Whether config.json says of any layer that it is no ordinary one."""
    return bool(_entry(folder))


def _entry(folder: Path) -> Any:
    try:
        content = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # who needs the file reads it with its own words for what is wrong
    settings = content.get("quantization_config") if isinstance(content, dict) else None
    return settings.get("blocks", {}) if isinstance(settings, dict) else {}


def block_settings(blocks: Blocks) -> dict[str, Any]:
    """The entry `blocks`, as it is written."""
    return {
        str(index): block.model_dump(exclude_defaults=True)
        for index, block in sorted(blocks.items())
    }
