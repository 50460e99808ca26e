"""Streaming perplexity: one decoder layer in memory, a batch of windows carried through all layers.

    ppl = exp( sum of next-token losses / number of predicted tokens )

Protocol: the text is tokenised once as one string, without special tokens, and cut into
non-overlapping windows of `seq_len`; the tail is dropped; every window predicts its own
`seq_len - 1` tokens. Figures for other window lengths are other quantities. The layers are read
once per batch; reading is cheap beside running them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rsprune import _core
from rsprune.checkpoint import Checkpoint
from rsprune.data import evaluation_windows, load_texts
from rsprune.errors import RspruneError, UsageError
from rsprune.layer_path import one_thread, run_layer
from rsprune.memory import give_freed_pages_back, keep_freed_pages
from rsprune.progress import NullProgress, Progress
from rsprune.skeleton import Skeleton, load_tokenizer
from rsprune.sources import resolve
from rsprune.stream import Stream

BATCH_BYTES = 256 * 2**20
"""Hidden states of one batch of windows."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on; `tokens` are predicted tokens."""

    perplexity: float
    loss: float
    tokens: int
    windows: int
    seq_len: int
    seconds: float


def perplexity(
    model: str | Path,
    text: str | Path,
    *,
    seq_len: int = 2048,
    windows: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Perplexity:
    """Measures the perplexity of a checkpoint on a text.

    Args:
        model: folder, hub id or GGUF file.
        text: a text file (or any source that calibration takes); documents are joined by newlines.
        seq_len: tokens of a window.
        windows: how many windows from the start of the text; None takes all.
        device: where the forward passes run.
        threads: torch threads; None takes what affinity and cgroup leave.

    Raises:
        UsageError: the text is shorter than a window, or the model cannot be opened.
        RspruneError: a loss is not finite.
    """
    started = time.perf_counter()
    keep_freed_pages()
    progress = progress or NullProgress()
    torch.set_num_threads(threads or _core.default_threads())
    folder = resolve(str(model), progress=progress.note)
    skeleton = Skeleton(Checkpoint.open(folder), device=device, trust_remote_code=trust_remote_code)
    ids = _token_windows(str(text), load_tokenizer(folder, trust_remote_code), seq_len)
    if windows is not None and windows > len(ids):
        raise UsageError(f"windows {windows}: the text holds only {len(ids)} of {seq_len} tokens")
    ids = ids[:windows]
    losses = list(window_losses(skeleton, ids, progress))
    loss = math.fsum(losses) / (len(ids) * (seq_len - 1))
    return Perplexity(
        perplexity=math.exp(loss),
        loss=loss,
        tokens=len(ids) * (seq_len - 1),
        windows=len(ids),
        seq_len=seq_len,
        seconds=time.perf_counter() - started,
    )


def window_losses(skeleton: Skeleton, ids: Tensor, progress: Progress) -> Iterator[float]:
    """The summed next-token loss (nats) of every window of `ids` [count, tokens].

    Windows run side by side, one torch thread each: the same bits for any number of threads, and
    no thread waits for another in the middle of a product (which halves the speed of a busy host).
    """
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=one_thread) as workers:
        yield from _batched_losses(skeleton, ids, progress, workers)


def _batched_losses(
    skeleton: Skeleton, ids: Tensor, progress: Progress, workers: Executor
) -> Iterator[float]:
    stream = Stream(skeleton)
    stream.check_ids(ids)
    stream.open(ids.shape[1])
    batch = max(1, BATCH_BYTES // (ids.shape[1] * skeleton.channels * 4))
    batches = [ids[at : at + batch] for at in range(0, len(ids), batch)]
    progress.stage("evaluate", len(batches) * len(skeleton.layers))
    total, seen = 0.0, 0
    for number, part in enumerate(batches):
        hidden = list(stream.embed(part))
        for index in range(len(skeleton.layers)):
            _run_layer(stream, index, hidden, workers)
            so_far = f", perplexity so far {math.exp(total / seen):.3f}" if seen else ""
            progress.step(f"windows {number * batch + 1}-{number * batch + len(part)}{so_far}")
        with stream.head() as loss_sum:
            for window, loss_tensor in zip(part, workers.map(loss_sum, hidden, part), strict=True):
                loss = float(loss_tensor)
                if not math.isfinite(loss):
                    raise RspruneError(f"window {seen}: expected a finite loss, found {loss}")
                total, seen = total + loss, seen + len(window) - 1
                yield loss


def _run_layer(stream: Stream, index: int, hidden: list[Tensor], workers: Executor) -> None:
    """Replaces the hidden states of every window by the layer's output."""
    skeleton = stream.skeleton
    skeleton.load_layer(index)
    layer, kwargs = skeleton.layers[index], stream.kwargs(index)

    def run(states: Tensor) -> Tensor:
        with torch.no_grad():
            return run_layer(layer, states, kwargs)

    hidden[:] = workers.map(run, hidden)
    skeleton.drop_layer(index)
    give_freed_pages_back()


def _token_windows(text: str, tokenizer: object, seq_len: int) -> Tensor:
    corpus = load_texts(text)
    return evaluation_windows("\n".join(corpus.documents), tokenizer, seq_len)
