"""Windows on their way through the layers of a model, one layer in memory.

Hidden states lie in files of the scratch folder: what is kept of every layer must not count as
memory, or the peak would grow with the number of layers. Windows run side by side, one torch
thread each, so results have the same bits for any number of threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rsprune.head import Head, Passage, Tally
from rsprune.layer_path import one_thread, run_layer
from rsprune.memory import give_freed_pages_back
from rsprune.stream import Stream
from rsprune.windows import Windows

Result = TypeVar("Result")
Arguments = list[dict[str, Any]]
"""Keyword arguments of every layer, for windows of one length."""


class Walk:
    """An open model and a place for hidden states.

    Args:
        stream: the model, opened.
        threads: windows that run side by side.
        scratch: folder for hidden states.
    """

    def __init__(self, stream: Stream, threads: int, scratch: Path) -> None:
        self.stream = stream
        self.skeleton = stream.skeleton
        self.threads = threads
        self.head = Head(stream)
        self._scratch = scratch
        self._stores: dict[str, Windows] = {}
        self._workers = ThreadPoolExecutor(threads, initializer=one_thread)

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown(cancel_futures=True)
        self._stores.clear()

    def store(self, name: str, count: int, tokens: int) -> Windows:
        """Room for hidden states, by a name that always stands for the same shape."""
        if name not in self._stores:
            path = self._scratch / name.replace(" ", "-")
            self._stores[name] = Windows(count, tokens, self.skeleton.channels, spill=path)
        return self._stores[name]

    def embed(self, ids: Tensor, target: Windows) -> Arguments:
        """Fills `target` with what enters the first layer; returns the layers' arguments.

        Args:
            ids: int64 [count, tokens].
        """
        for window, hidden in enumerate(self.stream.embed(ids)):
            target.put(window, hidden)
        give_freed_pages_back()
        return [self.stream.kwargs(index) for index in range(len(self.skeleton.layers))]

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index`, in memory for the length of the block."""
        self.skeleton.load_layer(index)
        try:
            yield self.skeleton.layers[index]
        finally:
            self.skeleton.drop_layer(index)
            give_freed_pages_back()

    def each(self, work: Callable[[int], Result], windows: Iterable[int]) -> list[Result]:
        """`work` for all windows, side by side; the results stand in order."""
        return list(self._workers.map(work, windows))

    def alone(self, work: Callable[[], Result]) -> Result:
        """`work` on one torch thread: the bits of a factorisation depend on their number."""
        return self._workers.submit(work).result()

    def advance(
        self, layer: nn.Module, kwargs: dict[str, Any], source: Windows, target: Windows
    ) -> None:
        """Runs a layer over all windows of `source` into `target`, which may be the same."""

        def run(window: int) -> None:
            with torch.no_grad():
                hidden = source.get(window, self.skeleton.device)
                target.put(window, run_layer(layer, hidden, kwargs))

        self.each(run, range(len(source)))

    def tallies(self, final: list[tuple[Windows, int]], ids: Tensor) -> list[Tally]:
        """What the head says of windows that have passed all layers.

        Args:
            final: windows, each as (where it lies, its number there).
            ids: int64 [windows of a store, tokens + 1]; window `n` is scored on `ids[n]`.
        """
        passages = [
            Passage(f"text {number}", ids[number][:-1], (ids[number][1:],)) for _, number in final
        ]
        tallies = [Tally(passage) for passage in passages]
        device = self.skeleton.device
        with self.stream.head():
            first, number = final[0]
            self.head.check(first.get(number, device))
            for piece in self.head.pieces():

                def add(place: int, piece: range = piece) -> None:
                    store, number = final[place]
                    tallies[place].add(self.head, store.get(number, device), piece)

                self.each(add, range(len(final)))
        give_freed_pages_back()
        return tallies
