"""What is decided about all operators before the first is pruned, and kept in the journal.

--allocate       sparsity by operators           see `allocate`
pbs2p            N of N:8 by layers              see `codes`
pbs2p-exact      a code by operators             see `codes`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rsprune import _core
from rsprune.allocate import allocate, exact_patterns, layer_means, measure
from rsprune.codes import coarse, knapsack, losses, redundancy
from rsprune.config import Config
from rsprune.methods.pbs2p_exact import DEFAULT_BITS, Planes
from rsprune.plan import Operator, Prepared, parse_pattern
from rsprune.progress import Progress
from rsprune.survey import IN_MEMORY, Spill


def decide(
    prepared: Prepared,
    windows: Tensor,
    config: Config,
    threads: int,
    progress: Progress,
    spill: Spill = IN_MEMORY,
) -> dict[str, Any]:
    """Measures, decides, and returns what the journal keeps.

    Args:
        prepared: the open model.
        windows: [count, tokens] ids; the first few are used.
        config: method and pattern.
        threads: worker threads.
        progress: is told of every layer.
        spill: where sums and what solvers hold lie.
    """
    if config.method == "pbs2p":
        found = redundancy(prepared, windows, threads, progress)
        target = int(config.pattern[0])
        weights = [0] * len(found)
        for operator in prepared.plan.operators:
            weights[operator.layer] += operator.rows * operator.columns
        return {"redundancy": found, "layers": coarse(found, weights, target)}
    if config.method == "pbs2p-exact":
        measured = losses(prepared, windows, config, threads, progress, spill)
        sizes = sum(o.rows * o.columns for o in prepared.plan.operators)
        budget = (config.bits or DEFAULT_BITS) * sizes
        chosen = knapsack(list(measured.values()), budget)
        return {
            "codes": {name: c.code for name, c in zip(measured, chosen, strict=True)},
            "losses": {n: {c.code: c.loss for c in choices} for n, choices in measured.items()},
            "true_bits": sum(c.bits for c in chosen) / sizes,
        }
    curves = measure(prepared, windows, config, threads, progress, spill)
    shares = allocate(curves, parse_pattern(config).sparsity)
    return {
        "operators": shares,
        "layers": layer_means(prepared.plan.operators, shares),
        "curves": {unit: [curve.intercept, curve.slope] for unit, curve in curves.items()},
    }


def patterns(
    decided: Mapping[str, Any], operators: Sequence[Operator], config: Config
) -> dict[str, _core.Pattern]:
    """What every operator is pruned to, by the name of its weight.

    Args:
        decided: what `decide` returned, now or in the run that is gone on with.
        operators: all that are pruned.
        config: method and pattern.
    """
    if config.method == "pbs2p":
        return {o.name: _core.Pattern(f"{decided['layers'][o.layer]}:8", "row") for o in operators}
    if config.method == "pbs2p-exact":
        return {o.name: Planes.of(decided["codes"][o.name]).pattern for o in operators}
    return exact_patterns(operators, decided["operators"], parse_pattern(config).sparsity)


def residuals(decided: Mapping[str, Any]) -> dict[str, _core.Pattern]:
    """The codes of second planes of signs, by the names of the weights that have one."""
    planes = {name: Planes.of(code).residual for name, code in decided.get("codes", {}).items()}
    return {name: plane for name, plane in planes.items() if plane is not None}
