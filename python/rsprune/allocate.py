"""Non-uniform sparsity: a budget over operators from measured error curves (ours).

    min sum over operators of E_o(s_o)    subject to    sum N_o s_o = S N,   s_o near S

`E_o(s)` is the relative error of a decoder layer's output, token by token, when one of its linears
is pruned to sparsity `s` on the dense model's hidden states: what a layer adds to the hidden states
stays there, so errors of all layers add up. Those of a layer's operators are scaled to add up to
its error with all of them pruned. Each curve is measured at three sparsities (SparseGPT, a few
windows) and fitted by an exponential, `ln E = a + b s`, for which the budget has a closed form:

    b_o E_o(s_o) = mu N_o    =>    s_o = (ln(mu N_o / b_o) - a_o) / b_o,   mu by bisection

The experts of a layer that have one role are one operator here.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from rsprune import _core
from rsprune.calibrate import LayerJob
from rsprune.checkpoint import TORCH_DTYPES
from rsprune.config import Config
from rsprune.layer_path import relative_error, with_parameters
from rsprune.methods.base import Operator as Task
from rsprune.methods.few_tokens import too_few
from rsprune.plan import Operator, Prepared, parse_pattern
from rsprune.progress import Progress
from rsprune.survey import IN_MEMORY, Seen, Spill, few, survey

BELOW, ABOVE = 0.3, 0.15
"""How far an operator's sparsity may be from the mean one."""
GRID = (-0.2, 0.0, 0.1)
"""Where its errors are measured, from the mean one."""
DAMPING = 0.01


@dataclass(frozen=True)
class Curve:
    """`ln E = intercept + slope * s` of one operator with `weights` weights."""

    intercept: float
    slope: float
    weights: int

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float]], weights: int) -> Curve:
        """Least squares through `(sparsity, error)`.

        Errors of zero, which are those of a sparsity of zero, say nothing of a slope.
        """
        points = [p for p in points if p[1] > 0] if any(e > 0 for _, e in points) else points
        if len(points) == 1:
            points = [*points, (points[0][0] - 0.1, points[0][1] / math.e)]
        x = torch.tensor([s for s, _ in points], dtype=torch.float64)
        y = torch.tensor([max(e, 1e-12) for _, e in points], dtype=torch.float64).log()
        centred = x - x.mean()
        slope = float((centred @ (y - y.mean())) / (centred @ centred))
        slope = max(slope, 0.1)  # noise must not make more zeros look better
        return cls(float(y.mean()) - slope * float(x.mean()), slope, weights)

    def error(self, sparsity: float) -> float:
        """The fitted error."""
        return math.exp(self.intercept + self.slope * sparsity)

    def sparsity(self, log_mu: float, low: float, high: float) -> float:
        """Where the curve's slope per weight is `exp(log_mu)`, within bounds."""
        free = (log_mu + math.log(self.weights / self.slope) - self.intercept) / self.slope
        return min(max(free, low), high)


def bounds(sparsity: float) -> tuple[float, float]:
    """The lowest and the highest sparsity of an operator where the mean is `sparsity`."""
    return max(sparsity - BELOW, 0.0), min(sparsity + ABOVE, (1 + sparsity) / 2)


def allocate(curves: Mapping[str, Curve], sparsity: float) -> dict[str, float]:
    """The sparsity of every curve's operator, by bisection of the multiplier.

    Args:
        curves: by unit.
        sparsity: what all together must have.
    """
    low, high = bounds(sparsity)
    total = sum(curve.weights for curve in curves.values())

    def reached(log_mu: float) -> float:
        return sum(c.weights * c.sparsity(log_mu, low, high) for c in curves.values()) / total

    left, right = -200.0, 200.0
    for _ in range(100):
        middle = (left + right) / 2
        left, right = (middle, right) if reached(middle) < sparsity else (left, middle)
    return {unit: curve.sparsity(right, low, high) for unit, curve in curves.items()}


def unit_of(operator: Operator) -> str:
    """What an operator shares its curve with: experts of a layer that have one role."""
    role = operator.linear
    if operator.expert is not None:
        role = re.sub(r"\.\d+\.", ".*.", role)
    return f"{operator.layer} {role}"


def exact_patterns(
    operators: Sequence[Operator], shares: Mapping[str, float], sparsity: float
) -> dict[str, _core.Pattern]:
    """A pattern for every operator so that the zeros of all together are exact.

    Args:
        operators: all that are pruned.
        shares: sparsities by unit. What rounding leaves over is taken by the last operators.
        sparsity: of all together.
    """
    sizes = [o.rows * o.columns for o in operators]
    zeros = [math.floor(shares[unit_of(o)] * n) for o, n in zip(operators, sizes, strict=True)]
    missing = round(sparsity * sum(sizes)) - sum(zeros)
    step = 1 if missing > 0 else -1
    places = itertools.cycle(reversed(range(len(zeros))))
    while missing:
        i = next(places)
        if 0 <= zeros[i] + step < sizes[i]:
            zeros[i] += step
            missing -= step
    return {
        o.name: _core.Pattern(repr(z / size), "matrix")
        for o, z, size in zip(operators, zeros, sizes, strict=True)
    }


def layer_means(operators: Sequence[Operator], shares: Mapping[str, float]) -> dict[str, float]:
    """The sparsity of every layer that has operators, for the eye."""
    weights: Counter[int] = Counter()
    zeros: dict[int, float] = {}
    for o in operators:
        weights[o.layer] += o.rows * o.columns
        zeros[o.layer] = zeros.get(o.layer, 0.0) + shares[unit_of(o)] * o.rows * o.columns
    return {str(layer): zeros[layer] / weights[layer] for layer in sorted(weights)}


def measure(
    prepared: Prepared,
    windows: Tensor,
    config: Config,
    threads: int,
    progress: Progress,
    spill: Spill = IN_MEMORY,
) -> dict[str, Curve]:
    """Error curves by unit, one decoder layer in memory at a time.

    Args:
        prepared: the open model.
        windows: [count, tokens] ids; the first few are used.
        config: pattern.
        threads: worker threads.
        progress: is told of every layer.
        spill: where sums and what solvers hold lie.
    """
    target = parse_pattern(config).sparsity
    curves: dict[str, Curve] = {}
    for seen in survey(prepared, windows, few(len(windows)), threads, spill.sums):
        found = _layer_curves(prepared, seen, target, spill.solver)
        curves |= found
        errors = [curve.error(target) for curve in found.values()]
        progress.step(f"layer {seen.index + 1}", sum(errors) if errors else None)
    return curves


def _layer_curves(
    prepared: Prepared, seen: Seen, target: float, spill: Path | None
) -> dict[str, Curve]:
    """The curves of one layer: errors measured at `target` add up to its own with all pruned."""
    low, high = bounds(target)
    grid = [min(max(target + d, low), high) for d in GRID]
    pruned = _pruned_layer(prepared, seen, grid, spill)
    units: dict[str, list[Operator]] = {}
    for operator in prepared.plan.operators:
        if operator.layer == seen.index:
            units.setdefault(unit_of(operator), []).append(operator)
    if not units:
        return {}
    names = {unit: [f"{o.linear}.weight" for o in found] for unit, found in units.items()}
    errors = {
        unit: [_error(seen, {n: values[n] for n in names[unit]}) for values in pruned]
        for unit in units
    }
    at_target = GRID.index(0.0)
    apart = sum(found[at_target] for found in errors.values())
    scale = _error(seen, pruned[at_target]) / max(apart, 1e-30)
    return {
        unit: Curve.fit(
            [(s, scale * e) for s, e in zip(grid, errors[unit], strict=True)],
            sum(o.rows * o.columns for o in found),
        )
        for unit, found in units.items()
    }


def _pruned_layer(
    prepared: Prepared, seen: Seen, grid: Sequence[float], spill: Path | None
) -> list[dict[str, Tensor]]:
    """The weights of a layer's operators at every sparsity of the grid, by name in the layer."""
    job, hidden = seen.job, seen.hidden
    operators = {o.linear: o for o in prepared.plan.operators if o.layer == seen.index}
    pruned: list[dict[str, Tensor]] = [{} for _ in grid]
    for group, sums in job.groups(hidden, hidden):
        for linear in group.linears:
            if linear in operators:
                for sparsity, values in zip(grid, pruned, strict=True):
                    task = _task(prepared, operators[linear], sums.calibration, sparsity, spill)
                    stored = _pruned(task, operators[linear], job.threads)
                    values[f"{linear}.weight"] = _as_held(stored, operators[linear], job)
    return pruned


def _error(seen: Seen, values: dict[str, Tensor]) -> float:
    """What the layer's output loses with these weights, on the windows that judge."""
    job = seen.job
    layer = with_parameters(job.layer, values)
    judged = range(job.split.calibration, job.split.count) or range(job.split.count)
    errors = [relative_error(layer, job.kwargs, seen.hidden, job.outputs, w) for w in judged]
    return float(sum(errors)) / len(errors)


def _pruned(task: Task, operator: Operator, threads: int) -> NDArray[Any]:
    """By SparseGPT; by the rule for experts where the few windows hold too few of its tokens."""
    few = too_few("sparsegpt", tokens=task.calibration.tokens, columns=operator.columns)
    if few and operator.expert is not None:
        return _core.magnitude(task, threads=threads)[0]
    return _core.sparsegpt(task, damping=DAMPING, threads=threads)[0]


def _as_held(stored: NDArray[Any], operator: Operator, job: LayerJob) -> Tensor:
    """As the layer holds its weights: stored types, those of experts not moved to its device."""
    weight = torch.from_numpy(stored).view(TORCH_DTYPES[operator.dtype])
    return weight if operator.expert is not None else weight.to(job.pool.device)


def _task(
    prepared: Prepared, operator: Operator, sums: Any, sparsity: float, spill: Path | None
) -> Task:
    weight = prepared.checkpoint.lend(operator.name)
    pattern = _core.Pattern(repr(sparsity), "matrix")
    return Task(weight, operator.dtype, pattern, sums, None, spill)
