"""Non-uniform sparsity: a budget over decoder layers from measured error curves (ours).

    min sum over layers of E_l(s_l)    subject to    sum N_l s_l = S N,   |s_l - S| <= RANGE

`E_l(s)` is the relative error of the layer's output, token by token, when its operators are pruned
to sparsity `s` on the dense model's hidden states: what a layer adds to the hidden states stays
there, so errors of all layers add up. Each curve is measured at three sparsities (SparseGPT, a few
windows) and fitted by an exponential, `ln E = a + b s`, for which the budget has a closed form:

    b_l E_l(s_l) = mu N_l    =>    s_l = (ln(mu N_l / b_l) - a_l) / b_l,   mu by bisection
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

RANGE = 0.12
"""How far a layer's sparsity may be from the mean one."""
DAMPING = 0.01


@dataclass(frozen=True)
class Curve:
    """`ln E = intercept + slope * s` of one decoder layer with `weights` prunable weights."""

    intercept: float
    slope: float
    weights: int

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float]], weights: int) -> Curve:
        """Least squares through `(sparsity, error)`; errors of zero count as tiny ones."""
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


def allocate(layers: Sequence[Curve | None], sparsity: float) -> list[float]:
    """The sparsity of every layer, by bisection of the multiplier.

    Args:
        layers: one curve per layer; None where nothing is pruned.
        sparsity: what all curves together must have.

    Returns:
        One sparsity per layer; zero where nothing is pruned.
    """
    low, high = max(sparsity - RANGE, 0.0), min(sparsity + RANGE, 0.99)
    curves = [curve for curve in layers if curve is not None]
    total = sum(curve.weights for curve in curves)

    def reached(log_mu: float) -> float:
        return sum(c.weights * c.sparsity(log_mu, low, high) for c in curves) / total

    left, right = -200.0, 200.0
    for _ in range(100):
        middle = (left + right) / 2
        left, right = (middle, right) if reached(middle) < sparsity else (left, middle)
    return [0.0 if curve is None else curve.sparsity(right, low, high) for curve in layers]


def exact_patterns(
    operators: Sequence[Operator], layers: Sequence[float], sparsity: float
) -> dict[str, _core.Pattern]:
    """A pattern for every operator so that the zeros of all together are exact.

    What rounding leaves over is taken by the last operators, a zero each.
    """
    sizes = [o.rows * o.columns for o in operators]
    zeros = [math.floor(layers[o.layer] * size) for o, size in zip(operators, sizes, strict=True)]
    missing = round(sparsity * sum(sizes)) - sum(zeros)
    step = 1 if missing > 0 else -1
    for i in range(abs(missing)):
        zeros[-1 - i % len(zeros)] += step
    return {
        o.name: _core.Pattern(repr(z / size), "matrix")
        for o, z, size in zip(operators, zeros, sizes, strict=True)
    }


def measure(
    prepared: Prepared,
    windows: Tensor,
    config: Config,
    threads: int,
    progress: Progress,
    spill: Spill = IN_MEMORY,
) -> list[Curve | None]:
    """Error curves of all decoder layers, one in memory at a time.

    Args:
        prepared: the open model.
        windows: [count, tokens] ids; the first few are used.
        config: pattern.
        threads: worker threads.
        progress: is told of every layer.
        spill: where sums and what solvers hold lie.
    """
    target = parse_pattern(config).sparsity
    curves: list[Curve | None] = []
    for seen in survey(prepared, windows, few(len(windows)), threads, spill.sums):
        curve = _curve(prepared, seen, target, spill.solver)
        curves.append(curve)
        progress.step(f"layer {seen.index + 1}", None if curve is None else curve.error(target))
    return curves


def _curve(prepared: Prepared, seen: Seen, target: float, spill: Path | None) -> Curve | None:
    job, hidden = seen.job, seen.hidden
    operators = {o.linear: o for o in prepared.plan.operators if o.layer == seen.index}
    grid = [min(max(target + d, 0.0), 0.98) for d in (-RANGE, 0.0, RANGE)]
    solved: list[dict[str, Tensor]] = [{} for _ in grid]
    for group, sums in job.groups(hidden, hidden):
        for linear in group.linears:
            if linear in operators:
                for sparsity, values in zip(grid, solved, strict=True):
                    task = _task(prepared, operators[linear], sums.calibration, sparsity, spill)
                    stored = _pruned(task, operators[linear], job.threads)
                    values[f"{linear}.weight"] = _as_held(stored, operators[linear], job)
    if not operators:
        return None
    judged = range(job.split.calibration, job.split.count) or range(job.split.count)
    points = []
    for sparsity, values in zip(grid, solved, strict=True):
        layer = with_parameters(job.layer, values)
        errors = [relative_error(layer, job.kwargs, hidden, job.outputs, w) for w in judged]
        points.append((sparsity, float(sum(errors)) / len(errors)))
    return Curve.fit(points, sum(o.rows * o.columns for o in operators.values()))


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
