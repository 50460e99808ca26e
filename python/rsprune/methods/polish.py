"""Refit and local search after any method, each kept only where the held-out error falls."""

from __future__ import annotations

from rsprune import _core
from rsprune.config import Config
from rsprune.methods.base import Operator, Pruned, Workspace

WORKSPACE = Workspace(matrices=9, squares=1, resident=1)
"""What a polish holds beside the stored weights."""


def polish(operator: Operator, pruned: Pruned, config: Config, *, threads: int | None) -> Pruned:
    """Polishes a method's result as the configuration asks; the result itself where it does not.

    The certificate keeps what the method said of its own course (lambda, rounds, iterations).
    """
    if not (config.refit or config.search):
        return pruned
    weight, before, _ = pruned
    polished, after = _core.polish(
        operator,
        weight,
        refit=config.refit,
        search=config.search,
        steps=config.polish_steps,
        threads=threads,
    )
    own = {key: before[key] for key in ("lambda", "rounds", "iterations", "converged")}
    return Pruned(polished, {**before, **after, **own})
