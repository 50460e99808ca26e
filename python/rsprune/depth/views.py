"""Two views of the same texts: as they are, and with letters changed.

Of the words of four letters or more a share is edited, each once: two adjacent letters change
places, a letter becomes another one, or one is inserted. New letters are drawn from the text
itself, so its script stays. Edits depend on (seed, iteration, text) alone. Both views are cut to
the same number of tokens.

Source: PIP, arXiv 2501.15278. Published: two views, one of them perturbed. Reconstructed: edits of
characters, their kinds and their rate.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from rsprune.data import Corpus, shuffled, token_ids
from rsprune.errors import RspruneError, UsageError
from rsprune.mixture import Source, by_turns, shares

WORD = re.compile(r"[^\W\d_]{4,}")
CHARACTERS_PER_TOKEN = 8
"""Characters that are taken for a token; a text that turns out too short gets more."""
SPARE = 1 / 8
"""Tokens beyond the needed ones: edits must not make a text too short."""


@dataclass(frozen=True)
class Texts:
    """Texts by which layers are scored.

    Attributes:
        texts: each longer than it needs to be.
        plain: int64 [texts, tokens + 1], the unedited view.
        sources: what each calibration text gave.
    """

    texts: list[str]
    plain: Tensor
    sources: tuple[Source, ...]

    def edited(self, tokenizer: Any, *, rate: float, seed: int, iteration: int) -> Tensor:
        """The other view, int64 [texts, tokens + 1]; a new one for every iteration.

        Raises:
            RspruneError: edits made a text too short.
        """
        length = self.plain.shape[1]
        views = []
        for index, text in enumerate(self.texts):
            chooser = Random(f"{seed} {iteration} {index}")  # a string: hashed by SHA-512
            ids = token_ids(tokenizer, perturb(text, rate, chooser))[:length]
            if len(ids) < length:
                raise RspruneError(
                    f"text {index}: expected {length} tokens after edits, found {len(ids)}; use "
                    "another text or a lower edit rate"
                )
            views.append(ids)
        return torch.tensor(views, dtype=torch.int64)


def choose_texts(
    corpora: Sequence[Corpus], tokenizer: Any, *, count: int, tokens: int, seed: int
) -> Texts:
    """Texts from the corpora by turns, each of them in an order that the seed chooses.

    Args:
        corpora: one or more; each gives as many texts as the others (the first ones one more).
        count: how many texts.
        tokens: that are predicted in each; a view has one more.
        seed: of the order of documents.

    Raises:
        UsageError: a corpus is too short for its share.
    """
    if count < len(corpora):
        raise UsageError(
            f"option texts: expected at least one for each of {len(corpora)} calibration texts, "
            f"found {count}"
        )
    parts = [
        _texts_of(corpus, tokenizer, share, tokens + 1, seed)
        for corpus, share in zip(corpora, shares(count, len(corpora)), strict=True)
    ]
    chosen = list(by_turns(parts))
    plain = torch.tensor([ids for _, ids in chosen], dtype=torch.int64)
    sources = tuple(
        Source(corpus.name, len(part), 0, len(part) * (tokens + 1))
        for corpus, part in zip(corpora, parts, strict=True)
    )
    return Texts([text for text, _ in chosen], plain, sources)


def _texts_of(
    corpus: Corpus, tokenizer: Any, count: int, length: int, seed: int
) -> list[tuple[str, list[int]]]:
    """`count` texts with their first `length` tokens: beginnings of documents, then what follows
    them; a short one is joined with the next.
    """
    needed = length + int(length * SPARE) + 1
    documents, text = deque(shuffled(corpus, seed)), ""
    found: list[tuple[str, list[int]]] = []
    while documents and len(found) < count:
        document = documents.popleft()
        cut = needed * CHARACTERS_PER_TOKEN
        if document[cut:].strip():
            documents.append(document[cut:])
        text = f"{text}\n\n{document[:cut]}" if text else document[:cut]
        ids = token_ids(tokenizer, text)
        if len(ids) >= needed:
            found.append((text, ids[:length]))
            text = ""
    if len(found) < count:
        raise UsageError(
            f"{corpus.name}: expected {count} texts of {needed} tokens, found {len(found)}"
        )
    return found


def perturb(text: str, rate: float, chooser: Random) -> str:
    """`text` with one edit in each of `rate` of its words of four letters or more (at least one).

    Args:
        text: anything; without such words it comes back as it is.
        rate: share of the words, above 0 and up to 1.
        chooser: gives the random numbers; only `random()` is called, which is the same in every
            version of Python.
    """
    words = list(WORD.finditer(text))
    letters = sorted({letter for word in words for letter in word[0].lower()})
    count = max(1, round(rate * len(words))) if words else 0
    pieces, end = [], 0
    for index in sorted(_sample(len(words), count, chooser)):
        word = words[index]
        pieces += [text[end : word.start()], _edit(word[0], letters, chooser)]
        end = word.end()
    return "".join([*pieces, text[end:]])


def _sample(total: int, count: int, chooser: Random) -> list[int]:
    """`count` of the numbers below `total`, each once."""
    numbers = list(range(total))
    for place in range(count):
        other = place + _below(total - place, chooser)
        numbers[place], numbers[other] = numbers[other], numbers[place]
    return numbers[:count]


def _below(count: int, chooser: Random) -> int:
    return int(chooser.random() * count)


def _edit(word: str, letters: list[str], chooser: Random) -> str:
    """The word with two letters swapped, one replaced or one inserted; never the same word."""
    kind, place = _below(3, chooser), _below(len(word), chooser)
    unequal = [i for i in range(len(word) - 1) if word[i] != word[i + 1]]
    if kind == 0 and unequal:
        i = unequal[_below(len(unequal), chooser)]
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    others = [letter for letter in letters if letter != word[place].lower()]
    if kind < 2 and others:
        new = others[_below(len(others), chooser)]
        return word[:place] + (new.upper() if word[place].isupper() else new) + word[place + 1 :]
    return word[:place] + letters[_below(len(letters), chooser)] + word[place:]
