"""The published replacement: whose weights are shared, and what the shared layer starts as.

    j       min over kept layers of  sum over linears |W^_i - (W^_j + Delta_ij)|_F
            W^: truncated SVD, Delta: its difference at rank r
    start   W_j + Delta on every linear, Delta the truncated SVD of W_i - W_j
    output  (h - mean) / std o gamma

Source: FlexiGPT (arXiv 2501.14713). Published are the metric, the start and the normalisation;
that `W^` has the adapters' rank, and that norms and biases are those of the removed layer, are
reconstructed, as is the start of gamma: the scale that the dense layer's typical token has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rsprune import _core
from rsprune.depth.walk import Walk
from rsprune.flexi.layers import sources_of, svd_start
from rsprune.flexi.site import Site, StandIn, built, weight_of
from rsprune.layer_path import run_layer
from rsprune.replaced_layers import linears_of, normalised

Triples = tuple[np.ndarray, np.ndarray, np.ndarray]


class Pairs:
    """Distances of layers; of every layer its truncated SVDs are computed once and kept in a file.

    Args:
        folder: where the files go.
        rank: of the truncated SVDs and of the free difference.
    """

    def __init__(self, walk: Walk, folder: Path, rank: int) -> None:
        self.walk, self.folder, self.rank = walk, folder, rank

    def nearest(self, index: int, others: Sequence[int]) -> tuple[int, dict[int, float]]:
        """The layer of `others` whose weights are nearest, and all distances."""
        distances = {other: self.distance(index, other) for other in others}
        return min(distances, key=lambda other: (distances[other], other)), distances

    def distance(self, one: int, other: int) -> float:
        """The metric of the module's header."""
        total = 0.0
        for name in linears_of(self.walk.skeleton.layers[one]):
            a, b = self._triples(one, name), self._triples(other, name)
            squared = _core.pair_distance(
                a, b, rank=min(self.rank, 2 * len(a[1])), threads=self.walk.threads
            )
            total += math.sqrt(squared)
        return total

    def _triples(self, index: int, name: str) -> Triples:
        path = self.folder / f"svd-{index}-{name}.npz"
        if not path.exists():
            weight = weight_of(self.walk, index, name)
            rank = min(self.rank, *weight.shape)
            left, values, right = _core.truncated_svd(
                weight, "F32", rank=rank, threads=self.walk.threads
            )
            np.savez(path, left=left, values=values, right=right)
        with np.load(path) as found:
            return found["left"], found["values"], found["right"]


def fit_published(
    site: Site, pairs: Pairs, kept: Sequence[int]
) -> tuple[StandIn, dict[int, float]]:
    """The published stand-in, untrained, and the distances by which its source was chosen."""
    source, distances = pairs.nearest(site.index, sources_of(site, kept))
    start = svd_start(site, source, ())
    channels = site.own.channels
    block = start.block.model_copy(update={"normalised": True})
    tensors = {**start.tensors, "output_gamma": torch.ones(channels, dtype=site.dtype)}
    stand_in = StandIn("svd", block, tensors)
    with built(site.walk, site.index, stand_in) as module:
        tensors["output_gamma"] = _gamma(site, module).to(site.dtype)
    with built(site.walk, site.index, stand_in) as module:
        errors = site.measure("svd", module, site.own)
    return StandIn("svd", block, tensors, errors), distances


def _gamma(site: Site, module: torch.nn.Module) -> torch.Tensor:
    """Per channel: rms of `y / std(y)` over that of the normalised output, times the median
    `std(y)`. A plain rms of `y` would be that of the few tokens with massive activations."""

    def parts(window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            y = site.dense_out.get(window, site.device)[0]
            output = run_layer(module, site.own.get(window, site.device), site.kwargs)[0]
            deviation = y.std(-1, unbiased=False, keepdim=True)
            one = torch.ones(output.shape[-1], device=output.device)
            shape, ours = y / deviation.clamp_min(1e-30), normalised(output, one)
            return shape.square().mean(0), ours.square().mean(0), deviation.flatten()

    found = site.walk.each(parts, range(site.split.calibration))
    theirs, ours = (torch.stack([part[k] for part in found]).mean(0) for k in (0, 1))
    typical = torch.cat([part[2] for part in found]).median()
    return (theirs / ours.clamp_min(1e-30)).sqrt() * typical
