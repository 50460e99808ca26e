"""Linear maps in the place of a removed layer.

    fold    h <- r + (I + D) m     m: what the layer before adds last to its residual stream r
    map     h <- h + B (A h)       of low rank

Both are ridge regressions of what is missing, `y - h`, on `m` or `h`: the ridge pulls toward the
identity, that is toward plain deletion. A fold is multiplied into the layer before it and costs
nothing; see `rsprune.depth.fold` for when a layer has such an `m`. A map stands behind that layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rsprune import _core
from rsprune.flexi.site import Errors, Site, StandIn, map_module, stored
from rsprune.layer_path import as_rows
from rsprune.replaced import Block
from rsprune.windows import Windows

DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
"""Penalties that are tried; held-out windows choose."""

DAMPING_UNSEEN = 0.1
"""The penalty where no window is held out."""


def penalties(site: Site) -> tuple[float, ...]:
    """What regressions may choose from."""
    return DAMPINGS if site.split.heldout else (DAMPING_UNSEEN,)


class Sums:
    """Weighted sums over calibration and over held-out windows, for one regression."""

    def __init__(self, site: Site, inputs: int, outputs: int) -> None:
        self.site = site
        self.calibration = _core.Regression(inputs, outputs)
        self.heldout = _core.Regression(inputs, outputs) if site.split.heldout else None

    def add(self, window: int, x: Tensor, targets: Tensor) -> None:
        """Adds `x` [tokens, inputs] and `targets` [tokens, outputs] of a window."""
        sums = self.calibration if window < self.site.split.calibration else self.heldout
        assert sums is not None
        weights = self.site.weights(window)
        threads = self.site.walk.threads
        sums.add(as_rows(x * weights), as_rows(targets * weights), threads=threads)

    def fit(self, rank: int | None) -> tuple[Tensor | None, Tensor] | None:
        """`(B [outputs, rank], A [rank, inputs])`, `(None, D)` for the full rank; None where the
        best map leaves more error than none."""
        output, given, facts = self.calibration.fit(
            self.heldout, rank=rank, dampings=penalties(self.site), threads=self.site.walk.threads
        )
        with_map, without = facts["heldout"] or facts["loss"]
        if not with_map < without:
            return None
        outer = None if output is None else torch.from_numpy(output).T.contiguous()
        return outer, torch.from_numpy(given)


def fit_map(site: Site, hidden: Windows) -> StandIn | None:
    """The map of rank `site.rank` that does best on `hidden`, in front of the removed layer."""
    channels = hidden.channels
    sums = Sums(site, channels, channels)
    for window in site.windows:
        x, y = (store.get(window, site.device)[0] for store in (hidden, site.dense_out))
        sums.add(window, x, y - x)
    fitted = sums.fit(min(site.rank, channels))
    if fitted is None or fitted[0] is None:
        return None
    tensors = balanced(fitted[0], fitted[1], site.dtype)
    errors = site.measure("map", map_module(tensors), hidden)
    return StandIn("map", Block(maps=[len(fitted[1])]), tensors, errors)


def balanced(outer: Tensor, inner: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Factors as stored, their sizes evened out rank by rank: `B A` does not change.

    Rounding to half types then costs the same in both, and training moves both alike.
    """
    ratio = (inner.norm(dim=1) / outer.norm(dim=0).clamp_min(1e-30)).sqrt()
    ratio = torch.where(ratio > 0, ratio, torch.ones_like(ratio))
    return {
        "lora_A.weight": (inner / ratio[:, None]).to(dtype).contiguous(),
        "lora_B.weight": (outer * ratio).to(dtype).contiguous(),
    }


def fit_fold(site: Site, caught: Windows, hidden: Windows) -> Tensor | None:
    """`D` [channels, channels], or None where no penalty lowers the held-out error.

    Args:
        caught: `m`.
        hidden: `r + m`.
    """
    sums = Sums(site, caught.channels, hidden.channels)
    for window in site.windows:
        m, h, y = (store.get(window, site.device)[0] for store in (caught, hidden, site.dense_out))
        sums.add(window, m, y - h)
    fitted = sums.fit(None)
    return None if fitted is None else fitted[1]


def folded(site: Site, layer: int, linear: str, known: dict[str, Tensor], d: Tensor) -> StandIn:
    """What a fold stores in the layer before; its errors are still to be measured.

    Args:
        layer: the number of the layer before.
        linear: its last linear, which adds `m`.
        known: its tensors that an earlier fold has changed.
        d: from `fit_fold`.
    """
    tensors = {}
    for leaf in ("weight", "bias"):
        name = f"{linear}.{leaf}"
        if leaf == "bias" and site.walk.skeleton.layers[layer].get_submodule(linear).bias is None:
            continue
        old = known.get(name)
        old = stored(site.walk, layer, name) if old is None else old

        def product(_: int, old: Tensor = old) -> Tensor:  # in a worker, which has one thread
            value = old.double()
            return (value + d.double() @ value).to(old.dtype)

        (tensors[name],) = site.walk.each(product, [0])
    return StandIn("fold", tensors=tensors)


def deletion(site: Site) -> StandIn:
    """Nothing stands in."""
    return StandIn("delete", errors=site.measure("delete", None, site.own))


def with_errors(stand_in: StandIn, errors: Errors) -> StandIn:
    """The same, measured."""
    return StandIn(stand_in.option, stand_in.block, stand_in.tensors, errors)
