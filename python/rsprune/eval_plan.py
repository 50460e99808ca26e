"""Which passages an evaluation carries through the layers together, within a memory bound.

What the weights of a layer and the work of a thread take comes first; what is left of the bound
holds hidden states. Neither batches nor threads change a bit of any result, so both are chosen
freely: as many threads as fit, then as many passages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils._pytree import tree_leaves

from rsprune.errors import DoesNotFitError
from rsprune.head import LOGIT_BYTES, Head, Passage
from rsprune.memory import KEPT_BYTES, give_freed_pages_back, rss_anon
from rsprune.skeleton import Skeleton
from rsprune.stream import Opening


@dataclass(frozen=True)
class EvalPlan:
    """The walk of an evaluation.

    Attributes:
        batches: indices of the passages, longest first.
        threads: passages that run side by side.
        peak_bytes: of anonymous memory, at most.
    """

    batches: list[list[int]]
    threads: int
    peak_bytes: int


@dataclass(frozen=True)
class Costs:
    """Bytes of anonymous memory by what they depend on.

    Attributes:
        fixed: by part, whatever is run.
        thread: by part, for each thread.
        token: for each token of a batch.
        length: for each token of a passage whose length no other one of the batch has.
    """

    fixed: dict[str, int]
    thread: dict[str, int]
    token: int
    length: int

    def batch(self, lengths: Sequence[int]) -> int:
        """For passages of these lengths."""
        return sum(lengths) * self.token + sum(set(lengths)) * self.length

    def together(self, threads: int) -> int:
        """For all but the passages."""
        return sum(self.fixed.values()) + threads * sum(self.thread.values())


def plan_batches(
    passages: Sequence[Passage], costs: Costs, *, limit: int, threads: int, most_tokens: int | None
) -> EvalPlan:
    """Divides passages into batches.

    Args:
        passages: one or more.
        costs: see `measure`.
        limit: bound in bytes.
        threads: as many as may run.
        most_tokens: of a batch with more than one passage; None for no such bound.

    Raises:
        DoesNotFitError: the longest passage alone needs more than `limit`.
    """
    lengths = [len(passage.inputs) for passage in passages]
    order = sorted(range(len(passages)), key=lambda index: -lengths[index])
    threads = _threads(costs, [lengths[index] for index in order], limit, threads)
    room = limit - costs.together(threads)
    batches: list[list[int]] = []
    held = tokens = most_held = 0
    for index in order:
        length = lengths[index]
        known = bool(batches) and lengths[batches[-1][-1]] == length
        need = costs.batch([length]) - (length * costs.length if known else 0)
        full = most_tokens is not None and tokens + length > most_tokens
        if not batches or full or held + need > room:
            batches.append([])
            held, tokens, need = 0, 0, costs.batch([length])
        batches[-1].append(index)
        held, tokens = held + need, tokens + length
        most_held = max(most_held, held)
    return EvalPlan(batches, threads, costs.together(threads) + most_held)


def _threads(costs: Costs, lengths: list[int], limit: int, threads: int) -> int:
    """How many of the longest passages fit side by side; `lengths` is sorted."""
    for count in range(min(threads, len(lengths)), 0, -1):
        if costs.together(count) + costs.batch(lengths[:count]) <= limit:
            return count
    smallest = costs.together(1) + costs.batch(lengths[:1])
    parts = {**costs.fixed, **costs.thread, "hidden states": costs.batch(lengths[:1])}
    shown = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in parts.items())
    raise DoesNotFitError(
        f"memory {limit / 2**20:.0f} MiB: too small for this evaluation, which needs "
        f"{math.ceil(smallest / 2**20)} MiB for {lengths[0]} tokens on one thread ({shown})",
        smallest=smallest,
    )


def measure(skeleton: Skeleton, opening: Opening, head: Head, longest: int) -> Costs:
    """What an evaluation of this model costs.

    Args:
        opening: of a stream that was opened at `longest` tokens.
        longest: tokens of the longest passage.
    """
    give_freed_pages_back()
    arguments = _argument_bytes(head, len(skeleton.layers))
    return Costs(
        fixed={
            "python, torch and the model's structure": rss_anon(),
            "decoder layer (as stored)": skeleton.layer_bytes(),
            "before and after the layers": _outer_bytes(skeleton) + 4 * head.piece * head.width,
            "freed pages that the allocator keeps": KEPT_BYTES + 32 * 2**20,
        },
        thread={
            "activations": _activation_bytes(skeleton, opening, longest),
            "a matrix as float32": _widened_bytes(skeleton),
            "logits": _logit_bytes(head, longest) + 2 * arguments,
        },
        token=4 * skeleton.channels + 32,  # a token's sums and scores take less than 32 bytes
        length=math.ceil(arguments / longest),
    )


def _widened_bytes(skeleton: Skeleton) -> int:
    """The largest matrix of a layer in float32, while it is multiplied with."""
    return 4 * max(p.numel() for layer in skeleton.layers for p in layer.parameters())


def _outer_bytes(skeleton: Skeleton) -> int:
    parameters = (skeleton.model.get_parameter(name) for name in skeleton.outer_names())
    return 4 * sum(int(parameter.numel()) for parameter in parameters)


def _argument_bytes(head: Head, layers: int) -> int:
    """Masks and rotary embeddings of one length; layers share most of them."""
    leaves = tree_leaves([head.stream.kwargs(index) for index in range(layers)])
    tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())


def _activation_bytes(skeleton: Skeleton, opening: Opening, longest: int) -> int:
    """What a layer holds of one passage beside its weights."""
    width = max(group.width for seen in opening.structures for group in seen.groups)
    held = 4 * longest * (6 * skeleton.channels + 4 * width)
    return held + skeleton.attention_bytes(longest)


def _logit_bytes(head: Head, longest: int) -> int:
    """Logits three times over: as a model may scale and cap them."""
    positions = head.chunk if head.stream.takes_positions else longest
    return 3 * max(LOGIT_BYTES, 4 * positions * head.piece)
