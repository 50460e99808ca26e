"""What tests of replaced layers share: options, and the runs that several of them look at."""

import json
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = {
    "method": "flexigpt", "remove": "3", "protect": (1, 1), "rank": 8, "samples": 6, "seq_len": 32,
    "heldout": 0.34, "threads": 1, "texts": 4, "text_tokens": 32,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "fold": {"replace": ("fold",)},
    "map": {"replace": ("map",)},
    "shared": {"replace": ("shared",)},
    "own": {"replace": ("own",)},
    "svd": {"replace": ("svd",)},
    "faithful": {"flexigpt_mode": "faithful"},
}


def blocks_of(out: Path) -> dict[int, dict[str, Any]]:
    """What config.json says of the layers."""
    settings = json.loads((out / "config.json").read_text()).get("quantization_config", {})
    return {int(key): value for key, value in settings.get("blocks", {}).items()}
