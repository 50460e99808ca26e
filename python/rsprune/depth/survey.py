"""`rsprune blocks`: scores of every decoder layer by every metric; nothing is removed."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rsprune import _core
from rsprune.config import Config
from rsprune.depth.losses import losses_without
from rsprune.depth.plan import (
    Opened,
    check_disk,
    check_fits,
    memory_of,
    scratch_bytes,
    survey_levels,
)
from rsprune.depth.scores import (
    GRADIENT_METRICS,
    Scores,
    Scoring,
    block_influence,
    gradient_scores,
)
from rsprune.depth.views import choose_texts
from rsprune.depth.walk import Walk
from rsprune.memory import PeakWatch, keep_freed_pages, memory_limit
from rsprune.mixture import Source, load_corpora
from rsprune.output import free_bytes
from rsprune.progress import NullProgress, Progress
from rsprune.skeleton import load_tokenizer
from rsprune.sources import resolve


@dataclass(frozen=True)
class Survey:
    """Scores of all layers.

    Attributes:
        scores: metric -> layer -> score; low ones are those that may go.
        sources: what each calibration text gave.
    """

    model: Path
    architecture: str
    layers: int
    scores: dict[str, Scores]
    sources: tuple[Source, ...]
    seconds: float
    peak_rss_anon: int


def survey(
    model: str | Path, config: Config | None = None, *, progress: Progress | None = None
) -> Survey:
    """Scores every decoder layer by every metric of depth pruning.

    Args:
        model: folder, hub id or GGUF file.
        config: calibration, texts, text_tokens, edit_rate, seed, memory, device, threads and
            trust_remote_code of it are read.
        progress: what is shown meanwhile.

    Raises:
        UsageError: the model or a text cannot be used.
        DoesNotFitError: memory does not suffice.
        RspruneError: a loss or a gradient is not finite.
    """
    started = time.perf_counter()
    keep_freed_pages()
    config, progress = config or Config(), progress or NullProgress()
    folder = resolve(str(model), progress=progress.note)
    with PeakWatch() as peak, tempfile.TemporaryDirectory(prefix="rsprune-") as scratch:
        opened = Opened.of(folder, config, config.text_tokens)
        check_fits(memory_of(opened, config, gradients=True, fold=False),
                   config.memory or memory_limit())  # fmt: skip
        levels = survey_levels(len(opened.skeleton.layers))
        needed = scratch_bytes(opened, config.model_copy(update={"fold": False}), levels)
        check_disk(Path(scratch), needed, free_bytes(Path(scratch)))
        corpora = load_corpora(config.calibration, field=config.calibration_field)
        for corpus in corpora:
            if corpus.note:
                progress.note(corpus.note)
        tokenizer = load_tokenizer(folder, config.trust_remote_code)
        texts = choose_texts(
            corpora, tokenizer, count=config.texts, tokens=config.text_tokens, seed=config.seed
        )
        opened.stream.check_ids(texts.plain)
        threads = config.threads or _core.default_threads()
        torch.set_num_threads(threads)
        with Walk(opened.stream, threads, Path(scratch)) as walk:
            scores = _scores(Scoring(walk, texts, tokenizer, config), progress)
    architecture, layers = type(opened.skeleton.model).__name__, len(opened.skeleton.layers)
    seconds = time.perf_counter() - started
    return Survey(folder, architecture, layers, scores, texts.sources, seconds, peak.peak)


def _scores(scoring: Scoring, progress: Progress) -> dict[str, Scores]:
    every = list(range(len(scoring.walk.skeleton.layers)))
    progress.stage("score", 3)
    scores = gradient_scores(scoring, every, 0, GRADIENT_METRICS)
    progress.step("gradients of two views")
    scores["bi"] = block_influence(scoring.walk, every, scoring.texts.plain[:, :-1])
    progress.step("block influence")
    scores["loss without"] = losses_without(scoring.walk, every, every, scoring.texts.plain)
    progress.step("loss without each layer")
    return scores
