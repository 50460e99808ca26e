"""What a flexigpt run would do, worked out from headers and shapes; all refusals."""

from __future__ import annotations

from pathlib import Path

from rsprune.config import Config
from rsprune.depth.cut import cut_config
from rsprune.depth.plan import (
    Opened,
    Prepared,
    check_disk,
    check_fits,
    layer_bytes,
    memory_of,
    read_config_text,
    scratch_bytes,
)
from rsprune.depth.remove import Removal, parse_removal
from rsprune.depth.scores import METHODS
from rsprune.errors import UsageError
from rsprune.flexi.extend import check_extension, repeated
from rsprune.memory import memory_limit
from rsprune.output import finished_bytes, free_bytes
from rsprune.plan import Plan
from rsprune.replaced_layers import linears_of
from rsprune.unused import unused_flexigpt_options

WINDOWS_IN_FILES = 7
"""Hidden states that lie in files at the same time."""


def prepare(folder: Path, config: Config, out: Path | None) -> Prepared:
    """Opens the checkpoint and plans the run; arguments and errors as of the depth methods."""
    if (config.remove is None) == (config.extend == 0):
        found = "neither" if config.remove is None else "both"
        raise UsageError(f"method flexigpt: expected either remove or extend, found {found}")
    opened = Opened.of(folder, config, max(config.text_tokens, config.seq_len))
    _check_experts(opened, config)
    skeleton, layers = opened.skeleton, len(opened.skeleton.layers)
    removal = _removal(config, layers)
    kept = [index for index in range(layers) if index not in removal.candidates[: removal.count]]
    if config.extend:
        check_extension(opened, config)
        again = repeated(layers, config.extend)
        kept = sorted([*kept, *again])
    trusted = config.trust_remote_code
    cut_config(read_config_text(folder), skeleton, kept, trust_remote_code=trusted)
    memory = memory_of(opened, config, gradients=False, fold=True)
    memory |= _fitting_memory(opened, config)
    limit = config.memory or memory_limit()
    stored = sum(t.nbytes for t in opened.checkpoint.tensors.values())
    most = adapter_bytes(opened, config) * (removal.count + config.extend)
    plan = Plan(
        model=folder,
        architecture=type(skeleton.model).__name__,
        layers=layers,
        operators=[],
        ignored=[],
        output_bytes=stored - min(layer_bytes(opened)) * removal.count + most,
        disk_free=free_bytes(out or folder),
        memory=list(memory.items()),
        peak_bytes=sum(memory.values()),
        memory_limit=limit,
        spill=("hidden states",),
        spill_bytes=_scratch(opened, config, most),
        passes=_passes(config),
        warnings=[*unused_flexigpt_options(config), *opened.warnings],
    )
    check_fits(memory, limit)
    if out is not None:
        needed = plan.output_bytes + plan.spill_bytes - finished_bytes(out)
        check_disk(out, needed, plan.disk_free)
    return Prepared(plan, opened, removal, METHODS["flexigpt"])


def _scratch(opened: Opened, config: Config, factors: int) -> int:
    """Files beside the output: hidden states, and factors of layers that are compared."""
    if config.extend:
        return 0
    window = 4 * config.seq_len * opened.skeleton.channels
    states = scratch_bytes(opened, config, 1)
    return states + WINDOWS_IN_FILES * config.samples * window + 2 * factors


def _removal(config: Config, layers: int) -> Removal:
    if config.extend:
        if config.extend > layers:
            raise UsageError(
                f"option extend: expected at most {layers}, the model's layers, "
                f"found {config.extend}"
            )
        return Removal(0, frozenset(), layers)
    if config.protect[0] < 1:
        raise UsageError(
            "option protect: expected at least 1 layer at the start for flexigpt, as stand-ins "
            f"follow a layer, found {config.protect[0]}"
        )
    return parse_removal(config, layers)


def _check_experts(opened: Opened, config: Config) -> None:
    """Refuses layers with experts where their weights would be shared or factored."""
    wanted: list[str] = [name for name in config.replace if name in ("shared", "own", "svd")]
    if config.flexigpt_mode == "faithful" or config.extend:
        wanted = ["adapters"]
    for index, seen in enumerate(opened.opening.structures):
        if seen.experts is not None and wanted:
            raise UsageError(
                f"layer {index}: has experts, for which there is no {' or '.join(wanted)}; "
                "expected dense layers, or option replace with fold and map only"
            )


def adapter_bytes(opened: Opened, config: Config) -> int:
    """The most that one stand-in stores: adapters and gains of all linears of a layer."""
    size = 4
    return max(
        sum(
            (config.rank + 1) * (linear.in_features + linear.out_features) * size
            for linear in linears_of(layer).values()
        )
        for layer in opened.skeleton.layers
    )


def per_rank(opened: Opened, layer: int) -> int:
    """Parameters that a rank costs over all linears of a layer."""
    linears = linears_of(opened.skeleton.layers[layer]).values()
    return sum(linear.in_features + linear.out_features for linear in linears)


def _fitting_memory(opened: Opened, config: Config) -> dict[str, int]:
    """What fitting holds beside what any depth run does."""
    if config.extend:
        return {}
    channels = opened.skeleton.channels
    groups = [group.width for seen in opened.opening.structures[:1] for group in seen.groups]
    kinds = 2 if config.heldout > 0 else 1
    layered = set(config.replace) & {"shared", "svd"} or config.flexigpt_mode == "faithful"
    n = max(groups) if layered else channels
    sums = kinds * (n * (n + 112) // 2 + n * channels)
    solving = n * n + 4 * n * channels + channels * channels
    own = sum(width * (width + 112) // 2 + 4 * width * channels for width in groups)
    most = max(sums + solving, own if "own" in config.replace else 0)
    tuned = 0
    if config.recover:
        norms_and_adapters = adapter_bytes(opened, config)
        tuned = norms_and_adapters * (5 + config.tune_batch)
        tuned += 4 * config.tune_batch * config.seq_len * (12 * channels + 6 * max(groups))
    return {
        "second layer (as stored)": opened.skeleton.layer_bytes(),
        "regressions": 4 * most,
        "adapters": 2 * adapter_bytes(opened, config),
        "recovery": tuned,
    }


def _passes(config: Config) -> str:
    if config.extend:
        return "none"
    if config.flexigpt_mode == "faithful":
        return "forward to score, then dense 1 and own 1, and 3 for every removed layer"
    return "forward to score, then dense 1 and own 1, and about 15 for every removed layer"
