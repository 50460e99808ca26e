"""The model's own forward, cut open at the decoder layers.

    hidden_0, kwargs of every layer  <-  forward with layers that hand their input through
    logits                           <-  forward whose last layer gives the stored hidden states

No layer weight is in memory in either. All windows have one length and no padding, so one window's
keyword arguments (masks, rotary embeddings) hold for all; that is checked, not assumed.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rsprune.blocks import LayerStructure, StopForwardError, watch
from rsprune.errors import RspruneError, UsageError
from rsprune.skeleton import Skeleton


@dataclass(frozen=True)
class Opening:
    """What was seen of the decoder layers; their arguments are `Stream.kwargs`.

    Attributes:
        structures: one per decoder layer.
    """

    structures: tuple[LayerStructure, ...]


class Stream:
    """Runs the parts of the model before and after its decoder layers."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.model = skeleton.model
        self.base = getattr(self.model, self.model.base_model_prefix, self.model)
        self._kwargs: list[dict[str, Any]] = [{} for _ in skeleton.layers]
        self._tuple = False
        self._final = threading.local()  # windows may be at the head side by side
        forward = inspect.signature(self.model.forward).parameters
        self.takes_positions = "logits_to_keep" in forward

    def open(self, seq_len: int) -> Opening:
        """Records keyword arguments and structure of every layer, reading no large tensor.

        Args:
            seq_len: tokens of a window.

        Raises:
            UsageError: the model has a table of positions, and it is shorter than that.
        """
        self._check_length(seq_len)
        with self._outer():
            embeddings = self._zeros(seq_len)
            first = self._record(embeddings, stop_at_first=True)
            structure = watch(self.skeleton.layers[0], first, self._kwargs[0])
            self._tuple = structure.returns_tuple
            hidden = self._record(embeddings)
        structures = [
            watch(layer, hidden, kwargs)
            for layer, kwargs in zip(self.skeleton.layers, self._kwargs, strict=True)
        ]
        return Opening(tuple(structures))

    def kwargs(self, layer: int) -> dict[str, Any]:
        """The keyword arguments of a layer, as last recorded."""
        return self._kwargs[layer]

    def _check_length(self, tokens: int) -> None:
        """Refuses what a learned table of positions has no rows for (torch: index out of range)."""
        warning = self.skeleton.beyond_context(tokens)
        if warning and self.skeleton.has_position_table():
            raise UsageError(f"{warning}, in a table of learned ones")

    def check_ids(self, windows: Tensor) -> None:
        """Raises `UsageError` if a token id of `windows` has no row in the model's vocabulary."""
        rows = int(self.model.get_input_embeddings().weight.shape[0])
        highest = int(windows.max())
        if highest >= rows:
            raise UsageError(
                f"tokenizer: expected token ids below {rows}, the model's vocabulary, "
                f"found {highest}"
            )

    def embed(self, windows: Tensor) -> Iterator[Tensor]:
        """Yields the hidden states [1, tokens, channels] float32 that enter the first layer.

        Args:
            windows: [count, tokens] int64 token ids.
        """
        with self._outer():
            for index, ids in enumerate(windows):
                before = list(self._kwargs)
                hidden = self._record(self._embedding(ids))
                if index == 1 and not _same(before, self._kwargs):
                    raise RspruneError(
                        f"{type(self.model).__name__}: expected layer arguments (masks, positions) "
                        "that do not depend on the tokens, found other ones for another window"
                    )
                yield hidden

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """Lets `logits` run: holds what follows the layers, but not the output embedding."""
        last = len(self.skeleton.layers) - 1

        def give(index: int, given: Tensor) -> Tensor:
            return self._final.hidden if index == last else given

        with self._outer(), self._replaced(give):
            yield

    def logits(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [positions, vocabulary] of the final hidden states; call inside of `head()`.

        Differentiable where `hidden` asks for it; no parameter does.

        Args:
            hidden: [1, tokens, channels] that the last layer gave.
            positions: int64, which tokens' logits are wanted; None gives those of all tokens.
        """
        self._final.hidden = hidden
        chosen = positions is not None and self.takes_positions
        extra = {"logits_to_keep": positions} if chosen else {}
        output = self.model(inputs_embeds=torch.zeros_like(self._like(hidden)), **extra)
        result: Tensor = output.logits[0]
        return result if positions is None or chosen else result[positions]

    def _record(self, embeddings: Tensor, *, stop_at_first: bool = False) -> Tensor:
        """Runs the base model with layers that hand through; returns the first one's input."""
        seen: list[Tensor] = []

        def give(index: int, hidden: Tensor) -> Tensor:
            if index == 0:
                seen.append(hidden.clone())
            if stop_at_first:
                raise StopForwardError
            return hidden

        with self._replaced(give), torch.no_grad(), contextlib.suppress(StopForwardError):
            self.base(inputs_embeds=embeddings)
        return seen[0]

    @contextlib.contextmanager
    def _replaced(self, give: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """Every layer's forward becomes `give(index, hidden)`, and notes its arguments."""
        for index, layer in enumerate(self.skeleton.layers):
            layer.forward = self._recorder(index, give)
        try:
            yield
        finally:
            for layer in self.skeleton.layers:
                del layer.forward

    def _recorder(self, index: int, give: Callable[[int, Tensor], Tensor]) -> Callable[..., Any]:
        names = list(inspect.signature(type(self.skeleton.layers[index]).forward).parameters)[1:]

        def forward(*args: Any, **kwargs: Any) -> Any:
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            given = named.pop(names[0])
            self._kwargs[index] = named
            hidden = give(index, given)
            return (hidden,) if self._tuple else hidden

        return forward

    @contextlib.contextmanager
    def _outer(self) -> Iterator[None]:
        with self.skeleton.materialised(self.skeleton.outer_names()):
            yield

    def _embedding(self, ids: Tensor) -> Tensor:
        """Runs the input embedding on just the rows that the window uses."""
        skeleton, module = self.skeleton, self.model.get_input_embeddings()
        if not isinstance(module, nn.Embedding):
            found = type(module).__name__
            raise UsageError(f"input embedding: expected nn.Embedding, found {found}")
        name = skeleton.disk_name(_parameter_names(skeleton, module)[0])
        assert name is not None
        used, compact = torch.unique(ids, return_inverse=True)
        stored = skeleton.checkpoint.rows(name, used.tolist())
        rows = stored.to(skeleton.device, torch.float32)
        full, padding = module._parameters["weight"], module.padding_idx
        module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        module.padding_idx = None  # it only stops gradients, and may exceed the compact table
        try:
            with torch.no_grad():
                embedded: Tensor = module(compact[None].to(skeleton.device))
            return embedded
        finally:
            module._parameters["weight"], module.padding_idx = full, padding

    def _zeros(self, seq_len: int) -> Tensor:
        width = self.model.get_input_embeddings().embedding_dim
        return torch.zeros(1, seq_len, width, device=self.skeleton.device)

    def _like(self, hidden: Tensor) -> Tensor:
        """Embeddings of the right length (their width may differ from the hidden states')."""
        return self._zeros(hidden.shape[1])


def _parameter_names(skeleton: Skeleton, module: nn.Module | None) -> list[str]:
    if module is None:
        return []
    prefix = skeleton.name_of(module)
    return [f"{prefix}.{name}" for name, _ in module.named_parameters()]


def _same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Whether two recordings agree; layers that share an object are compared once."""
    compared: set[tuple[int, int]] = set()
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        if (id(a), id(b)) in compared:
            continue
        compared.add((id(a), id(b)))
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return False
        if isinstance(a, Tensor) and not torch.equal(a, b):
            return False
    return True
