"""Tuning of one decoder layer after its operators are solved (ours).

    min  mean over tokens of |layer(x*) - y|^2 / |y|^2      over kept weights, biases and norms

`y` is the dense layer's output on the dense model's hidden states, `x*` what the compressed model
gives to the layer. Masks are fixed. Dividing by `|y|^2` counts every token alike: the next norm
does the same, while a plain square would fit the few tokens with massive activations and little
else. Adam with a step relative to each tensor's rms, cosine decay; after every pass over the
windows the layer is rounded to its stored types and judged on the held-out windows, and the best
rounded state is what is returned: never worse there than the layer that came in.

The windows of a batch run side by side, one torch thread each, and their gradients are added in
order: the same bits for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rsprune.config import Config
from rsprune.layer_path import one_thread, relative_error, with_parameters
from rsprune.windows import Split, Windows

BETAS = (0.9, 0.95)
PATIENCE = 3
"""Passes over the windows without a gain after which tuning stops."""


@dataclass
class Tuned:
    """What tuning did to a layer.

    Attributes:
        values: parameter name -> tuned value in float32, already rounded to its stored type.
        before: relative output error of the block before, on held-out (else all) windows.
        after: the same for `values`.
        steps: Adam steps taken.
    """

    values: dict[str, Tensor]
    before: float
    after: float
    steps: int


@dataclass
class LayerTuner:
    """Fits one layer; see the module's header.

    Attributes:
        layer: holds the compressed weights; not mutated.
        kwargs: the keyword arguments that the model gives to it.
        inputs: hidden states on the compressed path.
        targets: the dense layer's outputs.
        dtypes: stored type of every parameter that may change, by its name in the layer.
    """

    layer: nn.Module
    kwargs: dict[str, Any]
    inputs: Windows
    targets: Windows
    split: Split
    dtypes: dict[str, torch.dtype]
    config: Config
    threads: int
    _state: _Adam = field(init=False)
    _tuned: nn.Module = field(init=False)

    def run(self) -> Tuned:
        """Tunes; deterministic in the configuration's seed."""
        self._state = _Adam.of(self.layer, self.dtypes, self.config.tune_rate)
        self._tuned = with_parameters(self.layer, self._state.leaves)
        judged = range(self.split.calibration, self.split.count) or range(self.split.count)
        with ThreadPoolExecutor(self.threads, initializer=one_thread) as workers:
            before = best = self._judge(judged, workers)
            values, stale, steps = self._state.rounded(), 0, 0
            for batches in self._passes():
                for batch in batches:
                    self._step(batch, steps, workers)
                    steps += 1
                loss = self._judge(judged, workers)
                stale += 1
                if loss < best:
                    best, values, stale = loss, self._state.rounded(), 0
                if stale == PATIENCE:
                    break
        return Tuned(values, before, best, steps)

    def _passes(self) -> Iterator[list[list[int]]]:
        """Batches of calibration windows, pass after pass, `tune_steps` batches in all."""
        generator = torch.Generator().manual_seed(self.config.seed)
        left = self.config.tune_steps
        while left > 0:
            order = torch.randperm(self.split.calibration, generator=generator).tolist()
            size = self.config.tune_batch
            batches = [order[i : i + size] for i in range(0, len(order), size)][:left]
            left -= len(batches)
            yield batches

    def _step(self, batch: list[int], step: int, workers: Executor) -> None:
        rate = 0.5 * (1 + math.cos(math.pi * step / self.config.tune_steps))
        leaves = list(self._state.leaves.values())

        def gradients(window: int) -> tuple[Tensor, ...]:
            loss = self._loss(self._tuned, window) / len(batch)
            return torch.autograd.grad(loss, leaves)

        parts = list(workers.map(gradients, batch))
        self._state.step([sum(grads[1:], grads[0]) for grads in zip(*parts, strict=True)], rate)

    def _judge(self, windows: range, workers: Executor) -> float:
        rounded = with_parameters(self.layer, self._state.rounded())

        def loss(window: int) -> float:
            with torch.no_grad():
                return float(self._loss(rounded, window))

        return math.fsum(workers.map(loss, windows)) / len(windows)

    def _loss(self, layer: nn.Module, window: int) -> Tensor:
        return relative_error(layer, self.kwargs, self.inputs, self.targets, window)


@dataclass
class _Adam:
    """Leaves with their masks and moments; every tensor steps in units of its kept rms."""

    leaves: dict[str, nn.Parameter]
    dtypes: dict[str, torch.dtype]
    kept: list[Tensor]
    units: list[float]
    first: list[Tensor]
    second: list[Tensor]
    count: int = 0

    @classmethod
    def of(cls, layer: nn.Module, dtypes: dict[str, torch.dtype], rate: float) -> _Adam:
        given = {
            name: layer.get_parameter(name).detach().to(torch.float32, copy=True) for name in dtypes
        }
        kept = [value != 0 if value.dim() == 2 else torch.ones_like(value, dtype=torch.bool)
                for value in given.values()]  # fmt: skip
        units = [
            rate * float(value[mask].square().mean().sqrt()) if mask.any() else 0.0
            for value, mask in zip(given.values(), kept, strict=True)
        ]
        leaves = {name: nn.Parameter(value) for name, value in given.items()}
        first, second = ([torch.zeros_like(v) for v in leaves.values()] for _ in range(2))
        return cls(leaves, dtypes, kept, units, first, second)

    def step(self, gradients: list[Tensor], rate: float) -> None:
        """One step; moments are kept even where the mask lets nothing move."""
        self.count += 1
        with torch.no_grad():
            for leaf, gradient, kept, unit, m, v in zip(
                self.leaves.values(), gradients, self.kept, self.units, self.first, self.second,
                strict=True,
            ):  # fmt: skip
                m.lerp_(gradient, 1 - BETAS[0])
                v.lerp_(gradient.square(), 1 - BETAS[1])
                scale = math.sqrt(1 - BETAS[1] ** self.count) / (1 - BETAS[0] ** self.count)
                move = m / v.sqrt().add_(1e-12)
                leaf.sub_(move.mul_(kept), alpha=unit * rate * scale)

    def rounded(self) -> dict[str, Tensor]:
        """The values as they would be stored, in float32."""
        return {
            name: leaf.detach().to(self.dtypes[name]).float() for name, leaf in self.leaves.items()
        }
