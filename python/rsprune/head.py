"""The end of the model: probabilities of tokens, with a piece of the vocabulary in memory.

    log p(token) = logit_token - log sum_v exp(logit_v)

The sum goes over the vocabulary piece by piece: within a piece in float32, between pieces in
float64. Pieces have a size of their own, whatever the memory bound, so that results keep their
bits. Logits are the model's own (scaled, capped); each must depend on its own row of the output
embedding alone, and that is checked.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rsprune.errors import RspruneError, UsageError
from rsprune.stream import Stream

PIECE_BYTES = 64 * 2**20
"""Rows of the output embedding in memory at a time, in float32."""

LOGIT_BYTES = 16 * 2**20
"""Logits in memory at a time, in float32."""


@dataclass(frozen=True)
class Passage:
    """Tokens that are read, and tokens whose probability is asked for.

    Attributes:
        name: what errors call it.
        inputs: [T] int64.
        targets: one or more continuations, [n] int64 with n <= T: what follows each of the last n
            inputs.
    """

    name: str
    inputs: Tensor
    targets: tuple[Tensor, ...]


@dataclass(frozen=True)
class Score:
    """A continuation's log-likelihood in nats, and whether no token of it had a likelier rival."""

    log_likelihood: float
    greedy: bool


class Head:
    """The output embedding of a model, lent piece by piece.

    Raises:
        UsageError: the output embedding is no linear layer, or not of the shape of config.json.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._output = stream.model.get_output_embeddings()
        if not isinstance(self._output, nn.Linear):
            found = type(self._output).__name__
            raise UsageError(f"output embedding: expected nn.Linear, found {found}")
        name = stream.skeleton.name_of(self._output)
        self._names = {}
        for leaf, parameter in self._output.named_parameters():
            disk_name = stream.skeleton.disk_name(f"{name}.{leaf}")
            assert disk_name is not None  # the skeleton refused missing tensors
            shape = stream.skeleton.checkpoint.tensors[disk_name].shape
            if shape != tuple(parameter.shape):
                expected = f"expected shape {list(parameter.shape)} from config.json"
                raise UsageError(f"{disk_name}: {expected}, found {list(shape)}")
            self._names[leaf] = disk_name
        self.vocabulary, self.width = self._output.weight.shape
        self.piece = min(self.vocabulary, max(1, PIECE_BYTES // (4 * self.width)))
        self._room = {
            leaf: torch.empty(self.piece, *parameter.shape[1:])
            for leaf, parameter in self._output.named_parameters()
        }
        self.chunk = max(1, LOGIT_BYTES // (4 * self.piece))
        """Positions whose logits are made at a time."""

    def pieces(self) -> Iterator[range]:
        """Yields token ids, the rows of which are in memory until the next; inside of `head()`."""
        for first in range(0, self.vocabulary, self.piece):
            ids = range(first, min(first + self.piece, self.vocabulary))
            with self._rows(ids):
                yield ids

    @contextlib.contextmanager
    def _rows(self, ids: range) -> Iterator[None]:
        """Cuts the output embedding down to the rows `ids`, read into memory that is used again."""
        parameters = self._output._parameters
        whole, device = dict(parameters), self.stream.skeleton.device
        for leaf, name in self._names.items():
            rows = self._room[leaf][: len(ids)]
            self.stream.skeleton.checkpoint.copy_rows(name, ids, rows)
            parameters[leaf] = nn.Parameter(rows.to(device), requires_grad=False)
        try:
            yield
        finally:
            parameters.update(whole)

    def check(self, hidden: Tensor) -> None:
        """Compares a logit among others with the same one alone; inside of `head()`.

        Raises:
            RspruneError: they differ, so the vocabulary cannot be taken in pieces.
        """
        last = torch.tensor([hidden.shape[1] - 1], device=hidden.device)

        def first_logit(rows: int) -> float:
            with self._rows(range(rows)):
                return float(self.stream.logits(hidden, last)[0, 0])

        among, alone = first_logit(min(2, self.vocabulary)), first_logit(1)
        if math.isfinite(among) and not math.isclose(among, alone, rel_tol=1e-3, abs_tol=1e-3):
            raise RspruneError(
                f"{type(self.stream.model).__name__}: expected logits that do not depend on each "
                f"other, found {among} beside another and {alone} alone"
            )


class Tally:
    """What is known of a passage while pieces of the vocabulary go by."""

    def __init__(self, passage: Passage) -> None:
        self._targets = passage.targets
        self._count = max(len(target) for target in passage.targets)
        self._first = len(passage.inputs) - self._count
        self._log_sum = torch.full((self._count,), -torch.inf, dtype=torch.float64)
        self._best = torch.full((self._count,), -torch.inf)
        self._found = [torch.full((len(target),), torch.nan) for target in passage.targets]

    def add(self, head: Head, hidden: Tensor, ids: range) -> None:
        """Takes in the logits of the tokens `ids`, which the output embedding is cut down to.

        Args:
            hidden: [1, T, channels] that the last layer gave.
        """
        step = head.chunk if head.stream.takes_positions else self._count
        for start in range(0, self._count, step):
            rows = range(start, min(start + step, self._count))
            positions = torch.arange(rows.start, rows.stop, device=hidden.device) + self._first
            self._add(rows, head.stream.logits(hidden, positions).float().cpu(), ids)

    def _add(self, rows: range, logits: Tensor, ids: range) -> None:
        """Takes in `logits` [rows, ids], which are overwritten."""
        for target, found in zip(self._targets, self._found, strict=True):
            skip = self._count - len(target)  # a shorter continuation begins later
            wanted = target[max(0, rows.start - skip) : max(0, rows.stop - skip)]
            here = ((wanted >= ids.start) & (wanted < ids.stop)).nonzero()[:, 0]
            at = here + max(0, rows.start - skip)
            found[at] = logits[at + skip - rows.start, wanted[here] - ids.start]
        taken = slice(rows.start, rows.stop)
        top = logits.amax(-1)
        self._best[taken] = torch.maximum(self._best[taken], top)
        part = logits.sub_(top[:, None]).exp_().sum(-1).double().log() + top.double()
        self._log_sum[taken] = torch.logaddexp(self._log_sum[taken], part)

    def log_sums(self) -> Tensor:
        """`log sum_v exp(logit_v)` of scored positions, float64, when all pieces are through."""
        return self._log_sum

    def scores(self) -> list[Score]:
        """One for each continuation, when all pieces have gone by."""
        return [self._score(found) for found in self._found]

    def _score(self, found: Tensor) -> Score:
        last = slice(self._count - len(found), None)
        log_probabilities = found.double() - self._log_sum[last]
        return Score(float(log_probabilities.sum()), bool((found >= self._best[last]).all()))
