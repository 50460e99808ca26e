"""Packed folders of tiny models, each with the same run stored dense."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from packed_cases import weight_of
from safetensors.torch import load_file, save_file

from rsprune.config import Config
from rsprune.run import compress


@dataclass(frozen=True)
class Pair:
    """One run, stored twice."""

    model: Path
    dense: Path
    packed: Path
    config: Config


def pair_of(
    model: Path, folder: Path, documents: Path, pattern: str, method: str, bits: float | None = None
) -> Pair:
    """Runs `method` twice, for `folder/dense` and `folder/packed`."""
    config = Config(
        calibration=str(documents), method=method, pattern=pattern, samples=6, seq_len=32,
        heldout=0.34, threads=1, bits=bits,
    )  # fmt: skip
    packed = config.model_copy(update={"format": "packed"})
    compress(model, folder / "dense", config)
    compress(model, folder / "packed", packed)
    return Pair(model, folder / "dense", folder / "packed", packed)


def binarized(
    model: Path, folder: Path, pattern: str, link: Callable[[Path, Path], object]
) -> Path:
    """A copy of `model` whose linears are signs and scales, so that magnitude changes nothing."""
    folder.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            link(path, folder / path.name)
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    for seed, (name, tensor) in enumerate(sorted(tensors.items())):
        if ".layers." in name and tensor.dim() == 2:
            groups = tensor.shape[1] // int(pattern.partition(":")[2])
            bits, _ = weight_of(f"signs {pattern}", "BF16", len(tensor), groups, seed)
            tensors[name] = torch.from_numpy(np.ascontiguousarray(bits)).view(torch.bfloat16)
    save_file(tensors, folder / file.name, {"format": "pt"})
    return folder
