"""Streaming perplexity, with one decoder layer in memory.

    ppl = exp( sum of next-token losses / number of predicted tokens )

Protocol: the text is tokenised once as one string, without special tokens, and cut into
non-overlapping windows of `seq_len`; the tail is dropped; every window predicts its own
`seq_len - 1` tokens. Figures for other window lengths are other quantities.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rsprune.data import evaluation_windows, load_texts
from rsprune.errors import UsageError
from rsprune.eval_journal import Journal, fingerprint, open_journal
from rsprune.head import Passage
from rsprune.memory import PeakWatch
from rsprune.progress import NullProgress, Progress
from rsprune.scoring import Scorer
from rsprune.skeleton import load_tokenizer
from rsprune.sources import resolve

BATCH_TOKENS = 32_768
"""Tokens for which layers are read once: reading is then about a hundredth of the work, and it is
the most that a killed evaluation loses."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
        perplexity: `exp(loss)`.
        standard_error: of the perplexity, by the delta method: it times the standard error of the
            mean of the windows' losses, windows taken as independent; None for one window.
        loss: mean loss of a token, in nats.
        losses: summed loss of every window, in nats.
        tokens: predicted ones.
        windows: their number.
        seq_len: tokens of a window.
        seconds: of this run, which may have gone on with an earlier one.
        peak_rss_anon: the most anonymous memory that was seen in use, in bytes.
    """

    perplexity: float
    standard_error: float | None
    loss: float
    losses: list[float]
    tokens: int
    windows: int
    seq_len: int
    seconds: float
    peak_rss_anon: int


def perplexity(
    model: str | Path,
    text: str | Path,
    *,
    seq_len: int = 2048,
    windows: int | None = None,
    memory: int | str | None = None,
    resume: Path | None = None,
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
        memory: bound on anonymous memory, in bytes or as `4GiB`; None is 90 % of what the system
            has left. No bit of the result depends on it.
        resume: a file that keeps the losses of finished windows; they are not computed again.
        device: where the forward passes run.
        threads: worker threads; None takes what affinity and cgroup leave.
        trust_remote_code: whether code that lies in the model's folder may run.
        progress: what is shown meanwhile.

    Raises:
        UsageError: the text is shorter than a window, the model cannot be opened, or `resume` is
            not of this evaluation.
        DoesNotFitError: memory does not suffice for one window.
        RspruneError: a loss is not finite.
    """
    started = time.perf_counter()
    progress = progress or NullProgress()
    folder = resolve(str(model), progress=progress.note)
    with PeakWatch() as watch:
        scorer = Scorer.open(
            folder,
            memory=memory,
            device=device,
            threads=threads,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        if warning := scorer.skeleton.beyond_context(seq_len - 1):
            progress.note(f"warning: {warning}")
        ids = _token_windows(str(text), load_tokenizer(folder, trust_remote_code), seq_len)
        if windows is not None and windows > len(ids):
            raise UsageError(
                f"windows {windows}: the text holds only {len(ids)} of {seq_len} tokens"
            )
        current = {}
        if resume is not None:
            tokens = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
            parts = {"measure": "perplexity", "seq_len": seq_len, "text tokens": tokens}
            current = fingerprint(scorer.skeleton, **parts)
        with open_journal(resume, current) as journal:
            losses = window_losses(scorer, ids[:windows], journal)
    return _result(losses, seq_len, time.perf_counter() - started, watch.peak)


def window_losses(scorer: Scorer, ids: Tensor, journal: Journal) -> list[float]:
    """The summed next-token loss (nats) of every window.

    Args:
        ids: [count, tokens] int64.
        journal: gets the losses; those that it holds are taken from it.
    """
    names = [f"window {index}" for index in range(len(ids))]
    missing = [
        Passage(name, window[:-1], (window[1:],))
        for name, window in zip(names, ids, strict=True)
        if name not in journal.finished
    ]

    def so_far() -> str:
        done = [journal.finished[name] for name in names if name in journal.finished]
        if not done:
            return ""
        loss = math.fsum(done) / (len(done) * (ids.shape[1] - 1))
        return f", perplexity of {len(done)} windows {math.exp(loss):.3f}"

    for passage, (score,) in scorer.score(missing, most_tokens=BATCH_TOKENS, so_far=so_far):
        journal.write(passage.name, -score.log_likelihood)
    return [journal.finished[name] for name in names]


def _result(losses: list[float], seq_len: int, seconds: float, peak: int) -> Perplexity:
    predicted = seq_len - 1
    loss = math.fsum(losses) / (len(losses) * predicted)
    error = None
    if len(losses) > 1:
        spread = statistics.stdev(window / predicted for window in losses)
        error = math.exp(loss) * spread / math.sqrt(len(losses))
    return Perplexity(
        perplexity=math.exp(loss),
        standard_error=error,
        loss=loss,
        losses=losses,
        tokens=len(losses) * predicted,
        windows=len(losses),
        seq_len=seq_len,
        seconds=seconds,
        peak_rss_anon=peak,
    )


def _token_windows(text: str, tokenizer: object, seq_len: int) -> Tensor:
    corpus = load_texts(text)
    return evaluation_windows("\n".join(corpus.documents), tokenizer, seq_len)
