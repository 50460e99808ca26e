"""The loss of the model without each of its layers, all in one walk.

    base        goes through every layer
    without l   leaves the base before layer l, and goes through the layers above l

One layer is in memory at a time; hidden states of all these models lie in files.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import Tensor

from rsprune.depth.walk import Walk
from rsprune.errors import RspruneError
from rsprune.windows import Windows


def losses_without(
    walk: Walk, kept: list[int], candidates: Collection[int], ids: Tensor
) -> dict[int, float]:
    """Mean next-token loss in nats of the model `kept` without each of `candidates`.

    Args:
        kept: layers that are there.
        candidates: some of them.
        ids: int64 [texts, tokens + 1].

    Raises:
        RspruneError: a loss is not finite.
    """
    count, tokens = len(ids), ids.shape[1] - 1
    base = walk.store("base", count, tokens)
    kwargs = walk.embed(ids[:, :-1], base)
    without: dict[int, Windows] = {}
    for index in kept:
        with walk.layer(index) as layer:
            for other in without.values():
                walk.advance(layer, kwargs[index], other, other)
            if index in candidates:
                without[index] = walk.store(f"without {index}", count, tokens)
                without[index].copy_from(base)
            walk.advance(layer, kwargs[index], base, base)
    return dict(zip(without, _losses(walk, list(without.values()), ids), strict=True))


def _losses(walk: Walk, stores: list[Windows], ids: Tensor) -> list[float]:
    """Mean loss of each store's windows."""
    final = [(store, window) for store in stores for window in range(len(ids))]
    tallies = iter(walk.tallies(final, ids))
    predicted = len(ids) * (ids.shape[1] - 1)
    losses = []
    for _ in stores:
        parts = [next(tallies).scores()[0].log_likelihood for _ in range(len(ids))]
        losses.append(-math.fsum(parts) / predicted)
        if not math.isfinite(losses[-1]):
            raise RspruneError(f"calibration texts: expected a finite loss, found {losses[-1]}")
    return losses
