"""Which code every operator of a binarizing method gets.

PBS2P, by layers (published: the formula; ours: how c is found, how far N may be from the target):

    I_l = 1 - cos(input, output) of layer l, normalised to mean 1
    N_l = clamp(floor(N + c (I_l - 1) + 1/2), N - 2, N + 2),    mean of N_l over weights <= N

The mean is no monotone function of c, so instead of a bisection all c at which a layer's N changes
are looked at. Of those whose mean misses the target by no more than a tenth (or one step of one
layer), and that have at most half of the layers at a bound (beyond, they only bunch there), the
largest is taken.

PBS2P-exact, by operators (ours): a knapsack on losses that are measured code by code,

    min sum_o loss_o(code_o)    subject to    sum_o bits_o(code_o) <= bits * weights

where a loss is that of some rows, evenly spaced: a row's loss depends on no other row. It is solved
by its Lagrangian, `min loss + mu bits` operator by operator with mu by bisection; what is
left of the budget goes to the changes that gain most per bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsprune import _core
from rsprune.config import Config
from rsprune.errors import RspruneError
from rsprune.methods.base import Operator as Task
from rsprune.methods.pbs2p_exact import DEFAULT_BITS, Planes, measured_codes
from rsprune.plan import Prepared
from rsprune.progress import Progress
from rsprune.survey import IN_MEMORY, Spill, few, survey

SPAN = 2
"""How far a layer's N may be from the target."""
SHORT = 0.1
"""How far below the target their mean may be."""
ROWS = 192
"""Rows by which a code's loss is measured, or a few more."""


class Choice(NamedTuple):
    """One code of an operator."""

    code: str
    loss: float
    """Relative error of its output, held out where there are windows for it."""
    bits: float
    """All its weights together, everything counted."""


def redundancy(
    prepared: Prepared, windows: Tensor, threads: int, progress: Progress
) -> list[float]:
    """`I` of every decoder layer: what it changes of its input's direction, token by token."""
    found = []
    for seen in survey(prepared, windows, few(len(windows)), threads):
        outputs, device = seen.outputs(), prepared.skeleton.device
        count = seen.job.split.count
        pairs = ((seen.hidden.get(w, device), outputs.get(w, device)) for w in range(count))
        alike = [float(torch.cosine_similarity(x, y, dim=-1).mean()) for x, y in pairs]
        found.append(1.0 - sum(alike) / count)
        progress.step(f"layer {seen.index + 1}")
    mean = sum(found) / len(found)
    return [value / mean if mean > 0 else 1.0 for value in found]


def coarse(importance: Sequence[float], weights: Sequence[int], target: int) -> list[int]:
    """N of every layer.

    Args:
        importance: `I` of every layer, of mean 1.
        weights: how many weights of it are binarized.
        target: what the mean over weights must not exceed.
    """
    low, high = max(target - SPAN, 1), min(target + SPAN, 8)

    def layers(c: float) -> list[int]:
        raw = (math.floor(target + c * (i - 1) + 0.5) for i in importance)
        return [min(max(n, low), high) for n in raw]

    distances = [abs(i - 1) for i in importance if abs(i - 1) > 1e-9]
    # Between two of these no N changes.
    changes = {(k + 0.5) / distance for distance in distances for k in range(SPAN)}
    best, most = layers(0.0), max(max(weights), SHORT * sum(weights))
    for c in sorted(changes):
        found = layers(c * (1 + 1e-9))
        short = sum(w * (target - n) for w, n in zip(weights, found, strict=True))
        bunched = sum(n in (low, high) for n in found)
        if 0 <= short <= most and 2 * bunched <= len(found):
            best = found
    return best


def losses(
    prepared: Prepared,
    windows: Tensor,
    config: Config,
    threads: int,
    progress: Progress,
    spill: Spill = IN_MEMORY,
) -> dict[str, list[Choice]]:
    """Every operator with every code near the budget, on the dense model's hidden states."""
    found: dict[str, list[Choice]] = {}
    unseen: list[str] = []
    shapes = [(o.rows, o.columns) for o in prepared.plan.operators]
    codes = measured_codes(config.bits or DEFAULT_BITS, shapes)
    for seen in survey(prepared, windows, few(len(windows)), threads, spill.sums):
        operators = {o.linear: o for o in prepared.plan.operators if o.layer == seen.index}
        for group, sums in seen.job.groups(seen.hidden, seen.hidden):
            for operator in (operators[name] for name in group.linears if name in operators):
                weight = prepared.checkpoint.lend(operator.name)
                task = Task(
                    weight=np.ascontiguousarray(weight[:: max(1, len(weight) // ROWS)]),
                    dtype=operator.dtype,
                    pattern=Planes.of(codes[0]).pattern,
                    calibration=sums.calibration,
                    heldout=sums.heldout,
                    spill=spill.solver,
                )
                try:
                    found[operator.name] = _choices(
                        codes, task, weight.size, config.damping, threads
                    )
                    if sums.calibration.tokens == 0:
                        unseen.append(operator.name)
                except ValueError as error:
                    raise RspruneError(f"{operator.name}: {error}") from None
        progress.step(f"layer {seen.index + 1}")
    if unseen:
        progress.note(
            f"warning: {len(unseen)} experts' linears saw no token of the windows that codes are "
            f"chosen by ({unseen[0]}, ...): their losses are taken to be the mean ones"
        )
    return with_mean_losses(found, unseen)


def with_mean_losses(
    found: dict[str, list[Choice]], unseen: Sequence[str]
) -> dict[str, list[Choice]]:
    """The same with the mean losses of all others, code by code, for what has seen no token."""
    others = [choices for name, choices in found.items() if name not in set(unseen)]
    if not others or not unseen:
        return found
    mean = [math.fsum(c.loss for c in same) / len(others) for same in zip(*others, strict=True)]
    return found | {
        name: [c._replace(loss=loss) for c, loss in zip(found[name], mean, strict=True)]
        for name in unseen
    }


def _choices(
    codes: Sequence[str], task: Task, weights: int, damping: float, threads: int
) -> list[Choice]:
    """All codes of an operator, from one factor of its Gram."""
    found, planes = [], [(p.pattern, p.residual) for p in map(Planes.of, codes)]
    certificates = _core.pbs2p_losses(task, planes, damping=damping, threads=threads)
    for code, certificate in zip(codes, certificates, strict=True):
        heldout = certificate["heldout_error"]
        loss = certificate["error"] if heldout is None else heldout
        found.append(Choice(code, loss, certificate["packed_bits"] * weights))
    return found


def knapsack(operators: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """A choice for every operator with little loss and at most `budget` bits together.

    Args:
        operators: what there is to choose from.
        budget: bits; the smallest choices must fit.
    """

    def chosen(mu: float) -> list[Choice]:
        return [min(c, key=lambda choice: (choice.loss + mu * choice.bits, choice.bits))
                for c in operators]  # fmt: skip

    def total(choices: Sequence[Choice]) -> float:
        return math.fsum(choice.bits for choice in choices)

    budget += 0.5  # bits are whole, sums of floats are not
    low, high = 0.0, 1.0
    if total(chosen(0.0)) <= budget:
        return chosen(0.0)
    while total(chosen(high)) > budget:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if total(chosen(middle)) > budget else (low, middle)
    return _fill(operators, chosen(high), budget - total(chosen(high)))


def _fill(
    operators: Sequence[Sequence[Choice]], choices: list[Choice], room: float
) -> list[Choice]:
    """Changes choices for better ones as long as one fits into `room` bits."""
    while True:
        better = [
            ((now.loss - choice.loss) / max(choice.bits - now.bits, 1.0), -at, choice)
            for at, (now, options) in enumerate(zip(choices, operators, strict=True))
            for choice in options
            if choice.loss < now.loss and choice.bits - now.bits <= room
        ]
        if not better:
            return choices
        _, at, choice = max(better)
        room -= choice.bits - choices[-at].bits
        choices[-at] = choice
