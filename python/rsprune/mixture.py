"""Several calibration texts, taken by turns; what each of them gave is in the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsprune.data import Corpus, calibration_windows, heldout_mask, load_texts
from rsprune.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["Calibration", "Source", "by_turns", "interleaved", "load_corpora", "shares"]


@dataclass(frozen=True)
class Source:
    """What one calibration text gave."""

    name: str
    windows: int
    heldout: int
    tokens: int
    """Of all its windows."""


@dataclass(frozen=True)
class Calibration:
    """Windows of one or several texts.

    Attributes:
        calibration: int64 [n, seq_len], of all texts by turns.
        heldout: the same of the windows that no solver sees.
        sources: one per text, in the order in which they were given.
    """

    calibration: torch.Tensor
    heldout: torch.Tensor
    sources: tuple[Source, ...]


def load_corpora(sources: Sequence[str], *, field: str | None = None) -> list[Corpus]:
    """`load_texts` of every source; of the offline default where there is none."""
    return [load_texts(source, field=field) for source in sources or (None,)]


def interleaved(
    corpora: Sequence[Corpus],
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    heldout: float,
) -> Calibration:
    """`calibration_windows` of several texts, each giving as many windows as the others (the first
    ones one more), by turns; every text has its share of the held-out windows.

    Raises:
        UsageError: there are fewer windows than texts, or a text is too short for its share.
    """
    import torch

    if samples < len(corpora):
        raise UsageError(
            f"option samples: expected at least one window for each of {len(corpora)} texts, "
            f"found {samples}"
        )
    parts = [
        calibration_windows(corpus, tokenizer, samples=share, seq_len=seq_len, seed=seed)
        for corpus, share in zip(corpora, shares(samples, len(corpora)), strict=True)
    ]
    # Held-out windows are evenly spaced where each text's windows stand together: by turns, a step
    # that the number of texts divides would take all of them from one text.
    held = torch.split(heldout_mask(samples, heldout), [len(part) for part in parts])
    sources = tuple(
        Source(corpus.name, len(part), int(mask.sum()), part.numel())
        for corpus, part, mask in zip(corpora, parts, held, strict=True)
    )
    kept = [part[~mask] for part, mask in zip(parts, held, strict=True)]
    aside = [part[mask] for part, mask in zip(parts, held, strict=True)]
    return Calibration(_stacked(kept, seq_len), _stacked(aside, seq_len), sources)


def _stacked(parts: list[torch.Tensor], seq_len: int) -> torch.Tensor:
    """The windows of all parts by turns, [n, seq_len]; there may be none."""
    import torch

    windows = [window[None] for window in by_turns(parts)]
    return torch.cat([torch.empty(0, seq_len, dtype=torch.int64), *windows])


def shares(total: int, parts: int) -> list[int]:
    """`total` in whole numbers that differ by at most one, the larger ones first."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def by_turns(parts: Sequence[Any]) -> Iterator[Any]:
    """The first item of every part, then the second ones, until all are given."""
    for index in range(max(map(len, parts))):
        yield from (part[index] for part in parts if index < len(part))
