"""Folds the linear map of a removed span into the layer before it.

The layer before the span ends in a sum of the residual stream and the output of its last linear:

    x = r + m,   m = W a + b          (the MLP's down projection)

and the dense model turns its own hidden states into `y` behind the span. Without the span the next
layer would get `x`. What can be done for it at no cost is a map of `m`, as `r` passes by:

    min_D  sum |r + (I + D) m - y|^2 + lambda |D|^2
    D = K (G + lambda I)^-1,   G = sum m m^T,  K = sum (y - x) m^T
    W <- (I + D) W,   b <- (I + D) b

so the ridge pulls toward the identity, that is toward plain removal. No norm stands between `m` and
the sum, or the map could not be folded: classes that normalise the MLP's output (Gemma 2 and 3, OPT
with its norm last) and mixtures of experts have no such linear. Whether there is one is tried out:
a value added to the linear's output must come out of the layer as it is. The next layer's norm sees
`r + (I + D) m`, which is what is fitted, so nothing need be done about it.

`y` is the dense model's, `x` comes from the model that is left with all earlier maps folded in, so
a map makes up for what drifted before it, too. lambda is the best on held-out windows of a few, and
where none lowers their error nothing is folded. Sums are d x d; hidden states lie in files.

Source: ReplaceMe (arXiv 2505.02819) for folding a least-squares map into a down projection; the
ridge toward the identity, the compressed path and the held-out guard are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsprune import _core
from rsprune.checkpoint import TORCH_DTYPES, as_stored
from rsprune.depth.walk import Arguments, Walk
from rsprune.layer_path import as_rows, run_layer, with_parameters
from rsprune.windows import Split, Windows

RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
"""lambda relative to the mean of G's diagonal; from these the held-out windows choose."""

RIDGE_UNSEEN = 0.1
"""The same where no window is held out."""


@dataclass(frozen=True)
class Fold:
    """What was done to the layer before a removed span.

    Attributes:
        layer: its number in the dense model.
        tensors: what is to be stored in place of the dense tensors, by on-disk name.
        record: for the report: errors `|x - y|^2 / |y|^2` of what enters the layer behind the span
            (calibration, held-out, without the map and with it), and the ridge; or why not.
    """

    layer: int
    tensors: dict[str, NDArray[Any]]
    record: dict[str, Any]


def spans(kept: Sequence[int], layers: int) -> dict[int, int]:
    """Layer that stays -> the last layer of the removed span behind it.

    A span at the start of the model has no layer before it, and is left out.
    """
    ends = [*kept[1:], layers]
    return {layer: end - 1 for layer, end in zip(kept, ends, strict=True) if end > layer + 1}


def fold_spans(walk: Walk, kept: Sequence[int], ids: Tensor, split: Split) -> Iterator[Fold]:
    """Yields what becomes of each layer before a removed span, in order.

    Args:
        walk: the open dense model.
        kept: layers that stay.
        ids: int64 [windows, tokens], calibration windows before held-out ones.
        split: how many of each.
    """
    ends = spans(kept, len(walk.skeleton.layers))
    if not ends:
        return
    dense, own = (walk.store(f"fold {name}", *ids.shape) for name in ("dense", "own"))
    kwargs = walk.embed(ids, dense)
    own.copy_from(dense)
    folding: _Folding | None = None
    for index in range(max(ends.values()) + 1):
        with walk.layer(index) as layer:
            walk.advance(layer, kwargs[index], dense, dense)
            if index in ends:
                folding = _Folding(walk, index, kwargs, own, split)
                folding.catch(layer)
            elif index in kept:
                walk.advance(layer, kwargs[index], own, own)
        if folding is not None and index == ends[folding.index]:
            yield folding.solve(dense)
            folding = None


class _Folding:
    """One span: from the layer before it to the map.

    Args:
        index: of the layer before the span.
        own: what enters that layer; holds what it gives, with the map, in the end.
    """

    def __init__(
        self, walk: Walk, index: int, kwargs: Arguments, own: Windows, split: Split
    ) -> None:
        self.walk, self.index, self.kwargs = walk, index, kwargs[index]
        self.own, self.split = own, split
        shape = (split.count, own.tokens)
        self.output = walk.store("fold output", *shape)
        self.caught = walk.store("fold caught", *shape)
        self.linear: str | None = None

    def catch(self, layer: nn.Module) -> None:
        """Runs the layer; notes its output `x` and its last linear's output `m`."""
        hidden = self.own.get(0, self.walk.skeleton.device)
        self.linear = residual_linear(layer, self.kwargs, hidden)

        def run(window: int) -> None:
            caught: list[Tensor] = []
            copied = with_parameters(layer, {})
            if self.linear is not None:
                copied.get_submodule(self.linear).register_forward_hook(
                    lambda module, args, output: caught.append(output)
                )
            with torch.no_grad():
                hidden = self.own.get(window, self.walk.skeleton.device)
                self.output.put(window, run_layer(copied, hidden, self.kwargs))
            if caught:
                self.caught.put(window, caught[0])

        self.walk.each(run, range(self.split.count))

    def solve(self, dense: Windows) -> Fold:
        """The map to what the dense model has behind the span, `dense`."""
        before = self._errors(dense)
        if self.linear is None:
            self.own.copy_from(self.output)
            reason = "the layer adds no linear's output to the residual stream as it is"
            return Fold(self.index, {}, {"before": before, "skipped": reason})
        calibration = self._sums(dense, range(self.split.calibration))
        heldout = self._sums(dense, range(self.split.calibration, self.split.count))
        solved = self.walk.alone(partial(best_map, calibration, heldout))
        if solved is None:
            self.own.copy_from(self.output)
            reason = "no ridge lowers the error on held-out windows"
            return Fold(self.index, {}, {"before": before, "skipped": reason})
        difference, ridge = solved
        tensors = self._store(difference)
        return Fold(
            self.index, tensors, {"before": before, "after": self._errors(dense), "ridge": ridge}
        )

    def _sums(self, dense: Windows, windows: range) -> _core.Statistics | None:
        """`G` and `K` over windows: the core's sums with `m` as inputs, drifted by `y - x`."""
        if not windows:
            return None
        sums = _core.Statistics(self.walk.skeleton.channels, corrected=True)
        device = torch.device("cpu")
        for window in windows:
            m, x, y = (s.get(window, device)[0] for s in (self.caught, self.output, dense))
            sums.add(as_rows(m), as_rows(m - (y - x)), threads=self.walk.threads)
        return sums

    def _store(self, difference: Tensor) -> dict[str, NDArray[Any]]:
        """Puts the map in the layer as it will be stored, and runs on with it."""
        skeleton, tensors, values = self.walk.skeleton, {}, {}
        with self.walk.layer(self.index) as layer:
            assert self.linear is not None
            for leaf, parameter in layer.get_submodule(self.linear).named_parameters():
                name = skeleton.disk_name(skeleton.layer_name(self.index, f"{self.linear}.{leaf}"))
                assert name is not None  # the skeleton refused missing tensors
                mapped = self.walk.alone(partial(_mapped, difference, parameter))
                dtype = TORCH_DTYPES[skeleton.checkpoint.tensors[name].dtype]
                tensors[name] = as_stored(mapped, dtype)
                values[f"{self.linear}.{leaf}"] = mapped.to(dtype).to(parameter.dtype)
            folded = with_parameters(layer, values)
            self.walk.advance(folded, self.kwargs, self.own, self.own)
        self.output.copy_from(self.own)
        return tensors

    def _errors(self, dense: Windows) -> list[float | None]:
        """`|x - y|^2 / |y|^2` on calibration and on held-out windows, `x` being the output."""

        def parts(window: int) -> tuple[float, float]:
            device = self.walk.skeleton.device
            x, y = (store.get(window, device).double() for store in (self.output, dense))
            return float((x - y).square().sum()), float(y.square().sum())

        found = self.walk.each(parts, range(self.split.count))
        cut = self.split.calibration
        return [
            sum(error for error, _ in part) / sum(energy for _, energy in part) if part else None
            for part in (found[:cut], found[cut:])
        ]


def residual_linear(layer: nn.Module, kwargs: dict[str, Any], hidden: Tensor) -> str | None:
    """The last linear of a layer if its output is added to the layer's output as it is.

    Args:
        layer: materialised; not mutated.
        hidden: an input, [1, tokens, channels].
    """
    copied, called = with_parameters(layer, {}), []
    for name, module in copied.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, a, output, n=name: called.append(n))
    with torch.no_grad():
        plain = run_layer(copied, hidden, kwargs)
        last = called[-1]
        linear = copied.get_submodule(last)
        scale = float(plain.abs().mean())
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(plain.shape, generator=generator).to(plain.device) * scale
        linear.register_forward_hook(
            lambda m, a, output: (
                output + probe.reshape(output.shape) if output.numel() == probe.numel() else None
            )
        )
        moved = run_layer(copied, hidden, kwargs) - plain
    near = torch.allclose(moved, probe, rtol=1e-3, atol=1e-3 * max(scale, float(plain.abs().max())))
    return last if near else None


def best_map(
    calibration: _core.Statistics | None, heldout: _core.Statistics | None
) -> tuple[Tensor, float] | None:
    """The `D` whose held-out error is lowest, and its ridge; None where none lowers it.

    Args:
        calibration: sums `G` and `K` of the windows that are fitted.
        heldout: of the windows that judge; None where there are none.
    """
    assert calibration is not None
    gram, cross = _matrices(calibration)
    mean = float(gram.diagonal().mean())
    if heldout is None:
        return _ridge(gram, cross, RIDGE_UNSEEN * mean), RIDGE_UNSEEN
    other_gram, other_cross = _matrices(heldout)
    best: tuple[Tensor, float] | None = None
    lowest = 0.0  # of what a map changes in the error, relative to no map
    for ridge in RIDGES:
        difference = _ridge(gram, cross, ridge * mean)
        change = float((difference * (difference @ other_gram - 2 * other_cross)).sum())
        if change < lowest:
            best, lowest = (difference, ridge), change
    return best


def _matrices(sums: _core.Statistics) -> tuple[Tensor, Tensor]:
    cross = sums.cross()
    assert cross is not None  # the sums hold a drift
    return torch.from_numpy(sums.gram()), torch.from_numpy(cross)


def _ridge(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """`K (G + ridge I)^-1`, float64."""
    damped = gram + max(ridge, 1e-30) * torch.eye(len(gram), dtype=gram.dtype)
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped)).T


def _mapped(difference: Tensor, parameter: Tensor) -> Tensor:
    """`(I + D) p` in float32."""
    value = parameter.detach().cpu().double()
    return (value + difference @ value).float()
