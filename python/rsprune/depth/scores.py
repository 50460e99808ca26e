"""Scores of decoder layers: the lowest goes. All metrics are the mean over the texts.

    pip         size of g' - g: gradients of the loss of an edited view and of the plain one
                    l1: sum |g' - g|;  l2: sqrt(sum (g' - g)^2);  taylor: sum |w (g' - g)|
    taylor      sum |w g| on the plain view
    bi          1 - cos(h_in, h_out), mean over tokens
    perplexity  loss of the model without the layer
    given       place in a list of layers that the user names

Sums go over all parameters of a layer. Sources: PIP (arXiv 2501.15278; the two views, iterated
removal and gradient differences are published, the norm is not), block influence (ShortGPT, arXiv
2403.03853), Taylor and perplexity (Shortened LLaMA, arXiv 2402.02834).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rsprune.config import Config
from rsprune.depth.gradients import (
    Sizes,
    ViewGradient,
    backward,
    forward,
    sizes,
    top_gradient,
)
from rsprune.depth.losses import losses_without
from rsprune.depth.views import Texts
from rsprune.depth.walk import Walk
from rsprune.errors import RspruneError, UsageError
from rsprune.windows import Windows

Scores = dict[int, float]
"""Layer -> score."""


@dataclass(frozen=True)
class Scoring:
    """What a metric is measured with.

    Attributes:
        walk: the open model.
        texts: by which layers are scored.
        tokenizer: of the model, for edited views.
    """

    walk: Walk
    texts: Texts
    tokenizer: Any
    config: Config

    def edited(self, iteration: int) -> Tensor:
        """The edited view of an iteration, int64 [texts, tokens + 1]."""
        config = self.config
        return self.texts.edited(
            self.tokenizer, rate=config.edit_rate, seed=config.seed, iteration=iteration
        )


def pip(scoring: Scoring, kept: list[int], candidates: list[int], iteration: int) -> Scores:
    """PertImport of the candidates in the norm of the configuration."""
    norm = scoring.config.pip_norm
    found = gradient_scores(scoring, kept, iteration, (f"pip-{norm}",))[f"pip-{norm}"]
    return {index: found[index] for index in candidates}


def taylor(scoring: Scoring, kept: list[int], candidates: list[int], iteration: int) -> Scores:
    """First-order Taylor importance of the candidates."""
    found = gradient_scores(scoring, kept, iteration, ("taylor",))["taylor"]
    return {index: found[index] for index in candidates}


def bi(scoring: Scoring, kept: list[int], candidates: list[int], iteration: int) -> Scores:
    """Block influence of the candidates."""
    found = block_influence(scoring.walk, kept, scoring.texts.plain[:, :-1])
    return {index: found[index] for index in candidates}


def perplexity(scoring: Scoring, kept: list[int], candidates: list[int], iteration: int) -> Scores:
    """Mean loss without each candidate; orders them as perplexity does."""
    return losses_without(scoring.walk, kept, candidates, scoring.texts.plain)


def random(scoring: Scoring, kept: list[int], candidates: list[int], iteration: int) -> Scores:
    """Numbers that the seed chooses."""
    generator = torch.Generator().manual_seed(scoring.config.seed)
    return dict(zip(candidates, torch.rand(len(candidates), generator=generator).tolist(),
                    strict=True))  # fmt: skip


def given(scoring: Scoring, kept: list[int], candidates: list[int], iteration: int) -> Scores:
    """Places in the list of layers that the user names."""
    return {index: float(place) for place, index in enumerate(listed_layers(scoring.config))}


def listed_layers(config: Config) -> list[int]:
    """Layers that `remove` names one by one, in its order.

    Raises:
        UsageError: it names none, or one twice.
    """
    text = config.remove or ""
    if not re.fullmatch(r"\s*[0-9]+(\s*,\s*[0-9]+)*\s*", text):
        raise UsageError(
            "option remove: with --method given, expected layers such as 17,18,16 (the first layer "
            f"is 0), found {text!r}"
        )
    listed = [int(number) for number in text.split(",")]
    if twice := [number for number in listed if listed.count(number) > 1]:
        raise UsageError(f"option remove: layer {twice[0]} is named twice in {text}")
    return listed


@dataclass(frozen=True)
class DepthMethod:
    """A metric, and whether it is asked again after every layer that goes."""

    score: Callable[[Scoring, list[int], list[int], int], Scores]
    iterated: bool
    gradients: bool = False
    """Whether it takes backward passes."""


METHODS = {
    "pip": DepthMethod(pip, iterated=True, gradients=True),
    "bi": DepthMethod(bi, iterated=False),
    "taylor": DepthMethod(taylor, iterated=False, gradients=True),
    "perplexity": DepthMethod(perplexity, iterated=False),
    "perplexity-greedy": DepthMethod(perplexity, iterated=True),
    "random": DepthMethod(random, iterated=False),
    "given": DepthMethod(given, iterated=False),
    "flexigpt": DepthMethod(bi, iterated=False),
}
"""Name that `--method` takes -> what it does."""

GRADIENT_METRICS = ("pip-l1", "pip-l2", "pip-taylor", "taylor")
"""Metrics that one backward pass gives together."""


def gradient_scores(
    scoring: Scoring, kept: list[int], iteration: int, metrics: Sequence[str]
) -> dict[str, Scores]:
    """Scores of all layers `kept` from one forward and one backward pass over both views.

    Args:
        metrics: some of `GRADIENT_METRICS`.

    Returns:
        metric -> scores.
    """
    walk, plain = scoring.walk, scoring.texts.plain
    measure = _Measure(frozenset(metrics), walk.threads)
    edited = scoring.edited(iteration) if measure.differences else plain
    ids = torch.stack([plain, edited], 1).flatten(0, 1)
    states, kwargs = forward(walk, kept, ids[:, :-1])
    gradients = walk.store("gradients", len(ids), ids.shape[1] - 1)
    top_gradient(walk, states[len(kept)], ids, gradients)
    scores: dict[str, Scores] = {metric: {} for metric in metrics}
    for place in reversed(range(len(kept))):
        index = kept[place]
        found = backward(walk, index, kwargs[index], states[place], gradients, measure)
        for metric in metrics:
            values = [measure.value(metric, sizes_of_text) for sizes_of_text in found]
            scores[metric][index] = math.fsum(values) / len(values)
    return {metric: dict(sorted(values.items())) for metric, values in scores.items()}


@dataclass(frozen=True)
class _Measure:
    """What is measured of a layer's gradients for one text."""

    metrics: frozenset[str]
    threads: int

    @property
    def differences(self) -> bool:
        """Whether the edited view is needed."""
        return any(metric.startswith("pip-") for metric in self.metrics)

    def __call__(self, layer: nn.Module, views: list[ViewGradient]) -> tuple[Sizes, Sizes]:
        """Sizes of the difference of the views' gradients, and of the plain view's gradient."""
        plain, edited = views
        difference = of_plain = Sizes()
        if self.differences:
            only = self.metrics <= {"pip-l2", "taylor"}
            pair = [(1.0, edited), (-1.0, plain)]
            difference = sizes(layer, pair, squares_only=only, threads=self.threads)
        if "taylor" in self.metrics:
            of_plain = sizes(layer, [(1.0, plain)], squares_only=False, threads=self.threads)
        return difference, of_plain

    def value(self, metric: str, found: tuple[Sizes, ...]) -> float:
        """A metric of one text."""
        difference, plain = found
        return {
            "pip-l1": difference.l1,
            "pip-l2": math.sqrt(difference.squares),
            "pip-taylor": difference.taylor,
            "taylor": plain.taylor,
        }[metric]


def block_influence(walk: Walk, kept: list[int], ids: Tensor) -> Scores:
    """`1 - mean cos(h_in, h_out)` of every layer in `kept`.

    Args:
        walk: the open model.
        kept: layers that are there.
        ids: int64 [texts, tokens].

    Raises:
        RspruneError: hidden states are not finite.
    """
    stores = [walk.store(f"bi {place}", *ids.shape) for place in range(2)]
    kwargs = walk.embed(ids, stores[0])
    scores = {}
    for index in kept:
        source, target = stores
        with walk.layer(index) as layer:
            walk.advance(layer, kwargs[index], source, target)
        cosines = walk.each(partial(_cosine, walk, source, target), range(len(ids)))
        for text, cosine in enumerate(cosines):
            if not math.isfinite(cosine):
                raise RspruneError(
                    f"layer {index}, text {text}: expected finite hidden states, found a mean "
                    f"cosine of {cosine}"
                )
        scores[index] = 1.0 - math.fsum(cosines) / len(cosines)
        stores.reverse()
    return scores


def _cosine(walk: Walk, source: Windows, target: Windows, window: int) -> float:
    """Mean over a window's tokens."""
    before, after = (store.get(window, walk.skeleton.device) for store in (source, target))
    return float(torch.cosine_similarity(before.double(), after.double(), dim=-1).mean())
