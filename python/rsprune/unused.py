"""Options that a run would not look at, said before it starts: nobody sets one for nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rsprune.config import Config
from rsprune.methods.base import Inputs

METHODS = {
    "bits": ("pbs2p-exact", "gptq"),
    "damping": ("sparsegpt", "admm", "fista", "pbs2p", "pbs2p-exact", "billm", "arb", "gptq"),
    "rho_schedule": ("admm",),
    "budget": ("best",),
    "warm_start": ("fista", "fista-plus"),
    "iterations": ("fista", "fista-plus"),
    "xi": ("fista", "fista-plus"),
    "patience": ("fista", "fista-plus"),
    "max_rounds": ("fista", "fista-plus"),
    "lambda_start": ("fista", "fista-plus"),
}
"""Option -> the methods that read it."""

DEPTH = ("remove", "protect", "fold", "pip_norm", "edit_rate", "texts", "text_tokens")
FLEXIGPT = ("rank", "replace", "flexigpt_mode", "recover", "extend")
TUNING = ("tune_steps", "tune_rate", "tune_batch")
"""Options of methods that remove layers."""

SHARED = ("method", "calibration", "calibration_field", "seed", "memory", "device", "threads",
          "trust_remote_code")  # fmt: skip
"""Options of all methods."""

FOLD = ("samples", "seq_len", "heldout")
"""Options of the windows that a map is fitted to."""


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
    if not (config.refit or config.search or config.method == "fista-plus"):
        idle["polish_steps"] = "needs refit, search or fista-plus"
    if inputs.target == "own":
        idle["correction"] = "is for target dense, not for own"
    if not config.tune_block:
        idle |= dict.fromkeys(("tune_steps", "tune_rate", "tune_batch"), "needs tune_block")
    if not config.calibration:
        idle["calibration_field"] = "needs a calibration file"
    idle |= dict.fromkeys(DEPTH, f"is for methods that remove layers, not for {config.method}")
    idle |= dict.fromkeys(FLEXIGPT, f"is read by flexigpt, not by {config.method}")
    yield from _idle(config, idle)


def unused_depth_options(config: Config) -> Iterator[str]:
    """The same for a method that removes layers."""
    idle = {
        name: f"is for methods that prune weights, not for {config.method}"
        for name in Config.model_fields
        if name not in (*DEPTH, *SHARED, *FOLD)
    }
    if config.method != "pip":
        idle |= dict.fromkeys(("pip_norm", "edit_rate"), f"is read by pip, not by {config.method}")
    if not config.fold:
        idle |= dict.fromkeys(FOLD, "needs fold")
    if not config.calibration:
        idle["calibration_field"] = "needs a calibration file"
    yield from _idle(config, idle)


def unused_flexigpt_options(config: Config) -> Iterator[str]:
    """The same for `flexigpt`."""
    read = (*DEPTH, *SHARED, *FOLD, *FLEXIGPT, *TUNING)
    idle = {
        name: "is for methods that prune weights, not for flexigpt"
        for name in Config.model_fields
        if name not in read
    }
    idle |= dict.fromkeys(("pip_norm", "edit_rate"), "is read by pip, not by flexigpt")
    idle["fold"] = "is for methods that only remove; flexigpt has the option replace"
    if not config.recover:
        idle |= dict.fromkeys(TUNING, "needs recover")
    if config.flexigpt_mode == "faithful":
        idle |= dict.fromkeys(("replace", "recover"), "is not for flexigpt_mode faithful")
    if config.extend:
        scoring = ("replace", "recover", "flexigpt_mode", "protect", "texts", "text_tokens", *FOLD)
        idle |= dict.fromkeys(scoring, "is not for extend")
    if not config.calibration:
        idle["calibration_field"] = "needs a calibration file"
    yield from _idle(config, idle)


def _idle(config: Config, idle: Mapping[str, str]) -> Iterator[str]:
    for name, reason in idle.items():
        if getattr(config, name) not in (Config.model_fields[name].default, False):
            yield f"option {name} {reason}: it has no effect here"
