"""Streamed gradients and scores, against autograd on the whole model."""

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LAYERS, ordinary

from rsprune.config import Config
from rsprune.depth.gradients import forward, top_gradient, view_gradient
from rsprune.depth.losses import losses_without
from rsprune.depth.plan import Opened
from rsprune.depth.scores import (
    GRADIENT_METRICS,
    METHODS,
    Scoring,
    block_influence,
    gradient_scores,
)
from rsprune.depth.views import choose_texts
from rsprune.depth.walk import Walk
from rsprune.mixture import load_corpora
from rsprune.skeleton import load_tokenizer

TEXTS, TOKENS = 3, 20
CLASSES = ("llama", "llama_tied", "gemma2", "gpt_neox", "opt", "opt_projected", "qwen3_moe")


def scoring_of(
    folder: Path, text: Path, scratch: Path, threads: int = 1, **options: Any
) -> Scoring:
    shape = {"texts": TEXTS, "text_tokens": TOKENS, **options}
    config = Config.create(method="pip", calibration=str(text), **shape)
    opened, tokenizer = Opened.of(folder, config, config.text_tokens), load_tokenizer(folder)
    texts = choose_texts(load_corpora(config.calibration), tokenizer, count=config.texts,
                         tokens=config.text_tokens, seed=0)  # fmt: skip
    return Scoring(Walk(opened.stream, threads, scratch), texts, tokenizer, config)


@pytest.fixture(params=CLASSES)
def case(
    request: pytest.FixtureRequest, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> tuple[Path, Scoring]:
    folder = tiny(request.param)
    return folder, scoring_of(folder, text, tmp_path)


def layers_of(model: Any) -> torch.nn.ModuleList:
    return max(
        (m for m in model.modules() if isinstance(m, torch.nn.ModuleList)),
        key=lambda m: len(list(m[0].children())) * 100 + len(m),
    )


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids[None, :-1], use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits, ids[1:])


def naive_scores(model: Any, plain: torch.Tensor, edited: torch.Tensor) -> dict[str, list[float]]:
    """Every gradient of the whole model, both views, held at once."""
    layers, count = layers_of(model), len(plain)
    model.requires_grad_(True)
    scores = {metric: [0.0] * len(layers) for metric in GRADIENT_METRICS}
    for views in zip(plain, edited, strict=True):
        gradients = []
        for ids in views:
            model.zero_grad()
            loss_of(model, ids).backward()
            gradients.append([
                [(p.detach(), p.grad.clone() if p.grad is not None else torch.zeros_like(p))
                 for p in layer.parameters()] for layer in layers
            ])  # fmt: skip
        for index in range(len(layers)):
            pairs = list(zip(gradients[0][index], gradients[1][index], strict=True))
            g = [(w, (b - a).double()) for (w, a), (_, b) in pairs]
            scores["pip-l1"][index] += sum(float(d.abs().sum()) for _, d in g) / count
            scores["pip-l2"][index] += math.sqrt(sum(float(d.square().sum()) for _, d in g)) / count
            scores["pip-taylor"][index] += sum(float((w * d).abs().sum()) for w, d in g) / count
            of_plain = sum(float((w * a).double().abs().sum()) for (w, a), _ in pairs)
            scores["taylor"][index] += of_plain / count
    return scores


def test_scores_are_those_of_the_whole_models_gradients(case: tuple[Path, Scoring]):
    folder, scoring = case
    kept = list(range(LAYERS))
    found = gradient_scores(scoring, kept, 0, GRADIENT_METRICS)
    expected = naive_scores(ordinary(folder), scoring.texts.plain, scoring.edited(0))
    for metric in GRADIENT_METRICS:
        assert list(found[metric].values()) == pytest.approx(expected[metric], rel=1e-4), metric
    only = gradient_scores(scoring, kept, 0, ("pip-l2",))["pip-l2"]
    assert list(only.values()) == pytest.approx(expected["pip-l2"], rel=1e-4)


def test_what_a_views_linears_noted_is_freed_with_it(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
):
    scoring = scoring_of(tiny("llama"), text, tmp_path)
    walk, ids = scoring.walk, scoring.texts.plain[:, :-1]
    states, kwargs = forward(walk, [0], ids)
    gc.collect()
    gc.disable()  # what waits for a search for cycles piles up from text to text
    try:
        with walk.layer(0) as layer:
            hidden = states[0].get(0, walk.skeleton.device)
            found = view_gradient(layer, kwargs[0], hidden, torch.ones_like(hidden))
            noted = [weakref.ref(t) for calls in found.linears.values() for c in calls for t in c]
            assert len(noted) == 14  # two of each of the seven linears
            del found
            assert not any(reference() is not None for reference in noted)
    finally:
        gc.enable()


def test_the_gradient_at_the_top_takes_the_vocabulary_in_pieces(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
):
    folder = tiny("gemma2")  # its logits are capped
    scoring = scoring_of(folder, text, tmp_path)
    walk, ids = scoring.walk, scoring.texts.plain
    walk.head.piece, walk.head.chunk = 70, 7
    states, _ = forward(walk, list(range(LAYERS)), ids[:, :-1])
    gradients = walk.store("gradients", *ids[:, :-1].shape)
    top_gradient(walk, states[LAYERS], ids, gradients)
    model, last = ordinary(folder), []
    layers_of(model)[-1].register_forward_hook(lambda m, a, out: last.append(out.requires_grad_()))
    for window in range(len(ids)):
        loss = loss_of(model, ids[window])
        (expected,) = torch.autograd.grad(loss, last[-1])
        torch.testing.assert_close(
            gradients.get(window, torch.device("cpu")), expected, rtol=1e-4, atol=1e-7
        )


def test_scores_have_the_same_bits_for_any_number_of_threads(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
):
    found = []
    for threads in (1, 2, 5):
        scratch = tmp_path / str(threads)
        scratch.mkdir()
        scoring = scoring_of(tiny("llama"), text, scratch, threads)
        found.append(gradient_scores(scoring, [0, 2], 0, GRADIENT_METRICS))
    assert found[0] == found[1] == found[2]


def test_block_influence_and_losses_are_those_of_the_ordinary_model(case: tuple[Path, Scoring]):
    folder, scoring = case
    plain, kept = scoring.texts.plain, list(range(LAYERS))
    model, layers = ordinary(folder), layers_of(ordinary(folder))
    layers = layers_of(model)
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        layer.register_forward_hook(
            lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        for ids in plain:
            model(ids[None, :-1], use_cache=False)
    cosines = [float(torch.cosine_similarity(x.double(), y.double(), dim=-1).mean())
               for x, y in zip(inputs, outputs, strict=True)]  # fmt: skip
    expected = [1 - sum(cosines[i::LAYERS]) / TEXTS for i in kept]
    found = block_influence(scoring.walk, kept, plain[:, :-1])
    assert list(found.values()) == pytest.approx(expected, abs=1e-5)

    losses = losses_without(scoring.walk, kept, [1, 2], plain)
    for removed in (1, 2):
        skipped = ordinary(folder)
        layers_of(skipped)[removed].register_forward_hook(
            lambda m, args, kwargs, out: (
                ((args[0] if args else kwargs["hidden_states"]), *out[1:])
                if isinstance(out, tuple)
                else (args[0] if args else kwargs["hidden_states"])
            ),
            with_kwargs=True,
        )
        with torch.no_grad():
            mean = sum(float(loss_of(skipped, ids)) for ids in plain) / TEXTS
        assert losses[removed] == pytest.approx(mean, rel=1e-5)


def test_layers_that_are_gone_are_not_run(tiny: Callable[..., Path], text: Path, tmp_path: Path):
    scoring = scoring_of(tiny("llama"), text, tmp_path)
    found = gradient_scores(scoring, [0, 2], 0, ("pip-taylor",))["pip-taylor"]
    model = ordinary(tiny("llama"))
    del model.model.layers[1]
    expected = naive_scores(model, scoring.texts.plain, scoring.edited(0))["pip-taylor"]
    assert list(found) == [0, 2]
    assert list(found.values()) == pytest.approx(expected, rel=1e-4)


def test_every_iteration_edits_anew(tiny: Callable[..., Path], text: Path, tmp_path: Path):
    scoring = scoring_of(tiny("llama"), text, tmp_path)
    one, other, again = scoring.edited(0), scoring.edited(1), scoring.edited(0)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, scoring.texts.plain)
    scores = [METHODS["pip"].score(scoring, [0, 1, 2], [1, 2], n) for n in (0, 1)]
    assert list(scores[0]) == [1, 2]
    assert scores[0] != scores[1]


@pytest.mark.shared
@pytest.mark.slow
def test_scores_of_a_real_models_first_layers(smollm2: Path, text: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "first"
    model = AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=3, dtype="auto")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    scoring = scoring_of(folder, text, tmp_path, texts=2, text_tokens=64)
    found = gradient_scores(scoring, [0, 1, 2], 0, GRADIENT_METRICS)
    expected = naive_scores(ordinary(folder), scoring.texts.plain, scoring.edited(0))
    for metric in GRADIENT_METRICS:
        assert list(found[metric].values()) == pytest.approx(expected[metric], rel=1e-3), metric
