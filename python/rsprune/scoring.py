"""Log-likelihoods of tokens, streamed: a batch of passages is carried through all layers.

One decoder layer is in memory at a time, and read once for a batch; after the last one the output
embedding goes by in pieces. Every passage runs alone, unpadded and on one thread, so it has the
same bits beside any others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsprune import _core
from rsprune.checkpoint import Checkpoint
from rsprune.config import parse_bytes
from rsprune.errors import RspruneError, UsageError
from rsprune.eval_plan import measure, plan_batches
from rsprune.head import Head, Passage, Score, Tally
from rsprune.layer_path import one_thread, run_layer
from rsprune.memory import give_freed_pages_back, keep_freed_pages, memory_limit
from rsprune.progress import Progress
from rsprune.skeleton import Skeleton
from rsprune.stream import Stream


@dataclass(frozen=True)
class Scorer:
    """A model to be evaluated, and what it may use.

    Attributes:
        skeleton: the model's structure.
        memory: bound on anonymous memory in bytes.
        threads: passages that may run side by side.
        progress: what is shown meanwhile.
    """

    skeleton: Skeleton
    memory: int
    threads: int
    progress: Progress

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        memory: int | str | None,
        device: str,
        threads: int | None,
        trust_remote_code: bool,
        progress: Progress,
    ) -> Scorer:
        """Opens a checkpoint; options as in `evaluate.perplexity`.

        Raises:
            UsageError: the model cannot be opened, or `memory` is no size.
        """
        keep_freed_pages()
        count = threads or _core.default_threads()
        torch.set_num_threads(count)
        try:
            limit = parse_bytes(memory) if isinstance(memory, str) else memory or memory_limit()
        except ValueError as error:
            raise UsageError(f"option memory: {error}") from None
        checkpoint = Checkpoint.open(folder)
        skeleton = Skeleton(checkpoint, device=device, trust_remote_code=trust_remote_code)
        return cls(skeleton, limit, count, progress)

    def score(
        self,
        passages: Sequence[Passage],
        *,
        most_tokens: int | None = None,
        so_far: Callable[[], str] = str,
    ) -> Iterator[tuple[Passage, list[Score]]]:
        """Yields passages with a score for each of their targets, batch after batch.

        Args:
            passages: in any order and of any lengths.
            most_tokens: of a batch, whatever the memory; None for no such bound.
            so_far: what the display says beside the number of the batch.

        Raises:
            DoesNotFitError: memory does not suffice for the longest passage.
            RspruneError: a score is not finite.
        """
        if not passages:
            return
        stream, longest = Stream(self.skeleton), max(len(p.inputs) for p in passages)
        for passage in passages:
            stream.check_ids(passage.inputs)
        opening = stream.open(longest)
        head = Head(stream)
        plan = plan_batches(
            passages,
            measure(self.skeleton, opening, head, longest),
            limit=self.memory,
            threads=self.threads,
            most_tokens=most_tokens,
        )
        if plan.threads < min(self.threads, len(passages)):
            self.progress.note(f"memory suffices for {plan.threads} of {self.threads} threads")
        self.progress.stage("evaluate", len(plan.batches) * (len(self.skeleton.layers) + 1))
        with ThreadPoolExecutor(plan.threads, initializer=one_thread) as workers:
            for number, indices in enumerate(plan.batches):
                batch = _Batch(head, [passages[index] for index in indices], workers)
                for _ in batch.steps():
                    tail = so_far()
                    self.progress.step(f"batch {number + 1} of {len(plan.batches)}{tail}")
                yield from batch.scores()


class _Batch:
    """Passages on their way through the model."""

    def __init__(self, head: Head, passages: list[Passage], workers: Executor) -> None:
        self._head, self._stream, self._workers = head, head.stream, workers
        self._passages = passages
        self._hidden: list[Tensor] = [torch.empty(0)] * len(passages)
        self._kwargs: dict[int, list[dict[str, Any]]] = {}
        self._tallies = [Tally(passage) for passage in passages]

    def steps(self) -> Iterator[None]:
        """Runs all of the model; yields after each layer and at the end."""
        self._embed()
        for index in range(len(self._stream.skeleton.layers)):
            self._run_layer(index)
            yield
        with self._stream.head():
            self._head.check(self._hidden[0])
            for ids in self._head.pieces():
                self._tally(ids)
        give_freed_pages_back()
        yield

    def scores(self) -> Iterator[tuple[Passage, list[Score]]]:
        """The results, in the order of the passages."""
        for passage, tally in zip(self._passages, self._tallies, strict=True):
            scores = tally.scores()
            for score in scores:
                if not math.isfinite(score.log_likelihood):
                    found = -score.log_likelihood
                    raise RspruneError(f"{passage.name}: expected a finite loss, found {found}")
            yield passage, scores

    def _embed(self) -> None:
        """First hidden states, and the arguments of all layers for every length."""
        by_length: dict[int, list[int]] = {}
        for index, passage in enumerate(self._passages):
            by_length.setdefault(len(passage.inputs), []).append(index)
        for length, members in by_length.items():
            ids = torch.stack([self._passages[index].inputs for index in members])
            for index, states in zip(members, self._stream.embed(ids), strict=True):
                self._hidden[index] = states
            layers = range(len(self._stream.skeleton.layers))
            self._kwargs[length] = [self._stream.kwargs(index) for index in layers]
        give_freed_pages_back()

    def _run_layer(self, index: int) -> None:
        """Overwrites every passage's hidden states with the layer's output.

        In place: new tensors would leave holes in the heap as large as all hidden states.
        """
        skeleton = self._stream.skeleton
        skeleton.load_layer(index)
        layer = skeleton.layers[index]

        def run(passage: int) -> None:
            states = self._hidden[passage]
            kwargs = self._kwargs[states.shape[1]][index]
            with torch.no_grad():
                states.copy_(run_layer(layer, states, kwargs))

        self._each(run)
        skeleton.drop_layer(index)
        give_freed_pages_back()

    def _tally(self, ids: range) -> None:
        """Takes in the logits of a piece of the vocabulary, which is in memory."""

        def run(passage: int) -> None:
            self._tallies[passage].add(self._head, self._hidden[passage], ids)

        self._each(run)

    def _each(self, work: Callable[[int], None]) -> None:
        """Does `work` for all passages, side by side."""
        for _ in self._workers.map(work, range(len(self._passages))):
            pass
