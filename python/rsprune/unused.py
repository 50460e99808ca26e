"""Options that a run would not look at, said before it starts: nobody sets one for nothing."""

from __future__ import annotations

from collections.abc import Iterator

from rsprune.config import Config
from rsprune.methods.base import Inputs

METHODS = {
    "bits": ("pbs2p-exact", "gptq"),
    "damping": ("sparsegpt", "admm", "fista", "pbs2p", "pbs2p-exact", "billm", "arb", "gptq"),
    "rho_schedule": ("admm",),
    "budget": ("best",),
    "warm_start": ("fista",),
    "iterations": ("fista", "fista-plus"),
    "xi": ("fista", "fista-plus"),
    "patience": ("fista", "fista-plus"),
    "lambda_start": ("fista", "fista-plus"),
}
"""Option -> the methods that read it."""


def unused_options(config: Config, inputs: Inputs) -> Iterator[str]:
    """Yields a sentence for every option that differs from its default and has no effect.

    Args:
        config: the options.
        inputs: what the method is run on.
    """
    ratio = ":" not in config.pattern
    idle = {
        name: f"is read by {' and '.join(methods)}, not by {config.method}"
        for name, methods in METHODS.items()
        if config.method not in methods
    }
    if ratio:
        idle["permute"] = f"changes nothing for a ratio such as {config.pattern}"
    else:
        idle["scope"] = f"is for ratios, not for {config.pattern}"
    if inputs.target == "own":
        idle["correction"] = "is for target dense, not for own"
    if not config.tune_block:
        idle |= dict.fromkeys(("tune_steps", "tune_rate", "tune_batch"), "needs tune_block")
    if config.calibration is None:
        idle["calibration_field"] = "needs a calibration file"
    for name, reason in idle.items():
        if getattr(config, name) not in (Config.model_fields[name].default, False):
            yield f"option {name} {reason}: it has no effect here"
