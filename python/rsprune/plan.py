"""What a run would do, worked out from headers and shapes before any weight is read.

Everything that can be refused is refused here: pattern, dtype, disk, memory, output.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rsprune import _core, methods
from rsprune.blocks import LayerStructure
from rsprune.checkpoint import FLOATS, Checkpoint, TensorInfo
from rsprune.config import Config
from rsprune.data import split_heldout
from rsprune.errors import DoesNotFitError, UsageError
from rsprune.memory import KEPT_BYTES, memory_limit, rss_anon
from rsprune.methods.base import Inputs
from rsprune.output import finished_bytes, free_bytes
from rsprune.packing import planned_bytes
from rsprune.skeleton import Skeleton
from rsprune.stream import Opening, Stream
from rsprune.unused import unused_options

GRAM_BYTES = 4
"""Sums are kept in float32, symmetric ones up to their diagonal."""

GRAM_BLOCK = 112
"""Rows that end at the same column."""


@dataclass(frozen=True)
class Operator:
    """One linear that will be pruned; `name` is that of its weight on disk."""

    name: str
    layer: int
    linear: str
    rows: int
    columns: int
    dtype: str
    group: int
    expert: int | None = None


@dataclass(frozen=True)
class Plan:
    """The walk of a run. Sizes are in bytes."""

    model: Path
    architecture: str
    layers: int
    operators: list[Operator]
    ignored: list[str]
    output_bytes: int
    disk_free: int
    memory: list[tuple[str, int]]
    peak_bytes: int
    memory_limit: int
    spill: tuple[str, ...]
    passes: str
    warnings: list[str]


@dataclass(frozen=True)
class Prepared:
    """A plan with the open objects that it was made from."""

    plan: Plan
    checkpoint: Checkpoint
    skeleton: Skeleton
    stream: Stream
    opening: Opening
    inputs: Inputs


def prepare(folder: Path, config: Config, out: Path | None) -> Prepared:
    """Opens the checkpoint and plans the run of a method that prunes weights.

    Args:
        folder: of the model.
        config: the options.
        out: where the output would lie, to look at its disk.

    Raises:
        UsageError: naming the tensor or option, what was expected and what was found.
    """
    method = methods.get(config.method)
    inputs = methods.inputs_of(method, config)
    pattern = parse_pattern(config)
    checkpoint = Checkpoint.open(folder)
    skeleton = Skeleton(
        checkpoint, device=config.device, trust_remote_code=config.trust_remote_code
    )
    skeleton.refuse_replaced()
    stream = Stream(skeleton)
    opening = stream.open(config.seq_len)
    operators, ignored = _operators(skeleton, opening, config, pattern)
    notes = list(unused_options(config, inputs))
    if isinstance(method, methods.Binarizer):
        notes += method.check_shapes([(o.rows, o.columns) for o in operators], config)
    memory = _memory(skeleton, opening, inputs, config, operators)
    limit = config.memory or memory_limit()
    peak, spill = _fit(memory, limit)
    plan = Plan(
        model=folder,
        architecture=type(skeleton.model).__name__,
        layers=len(skeleton.layers),
        operators=operators,
        ignored=ignored,
        output_bytes=_output_bytes(checkpoint, operators, config, pattern),
        disk_free=free_bytes(out or folder),
        memory=list(memory.items()),
        peak_bytes=peak,
        memory_limit=limit,
        spill=spill,
        passes=_passes(inputs, config),
        warnings=[*_warnings(skeleton, operators, config), *notes],
    )
    scratch = 2 * _pruned_bytes(skeleton, operators, experts=True)
    _check_disk(plan, out, scratch + sum(memory[name] for name in spill))
    return Prepared(plan, checkpoint, skeleton, stream, opening, inputs)


def parse_pattern(config: Config) -> _core.Pattern:
    """The pattern of the configuration, with the method's scope unless the user chose one."""
    method = methods.get(config.method)
    if isinstance(method, methods.Binarizer):
        return _core.Pattern(method.check(config), method.scope)
    scope = config.scope or method.scope
    if config.allocate:
        if ":" in config.pattern:
            raise UsageError(
                f"option allocate: expected a ratio such as 70%, found {config.pattern}"
            )
        if config.scope == "row":
            raise UsageError("option scope: expected matrix beside allocate, found row")
        scope = "matrix"  # zeros of a row could not add up to the exact ratio
    try:
        return _core.Pattern(config.pattern, scope)
    except ValueError as error:
        raise UsageError(str(error)) from None


def is_ignored(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the on-disk tensor `name` matches a glob, with or without `.weight` and prefix."""
    bare = name.removesuffix(".weight")
    forms = {name, bare, bare.rpartition(".")[2]}
    return any(fnmatch.fnmatchcase(form, glob) for form in forms for glob in patterns)


def _operators(
    skeleton: Skeleton, opening: Opening, config: Config, pattern: _core.Pattern
) -> tuple[list[Operator], list[str]]:
    operators, ignored = [], []
    for layer, structure in enumerate(opening.structures):
        for index, group in enumerate(structure.groups):
            for linear in group.linears:
                parameter = skeleton.layer_name(layer, f"{linear}.weight")
                name = skeleton.disk_name(parameter)
                assert name is not None  # the skeleton refused missing tensors
                if is_ignored(name, config.ignore):
                    ignored.append(name)
                    continue
                info = skeleton.checkpoint.tensors[name]
                shape = tuple(skeleton.model.get_parameter(parameter).shape)
                _check_tensor(info, shape, pattern)
                rows, columns = info.shape
                operators.append(
                    Operator(name, layer, linear, rows, columns, info.dtype, index, group.expert)
                )
    if not operators:
        raise UsageError(f"ignore {list(config.ignore)}: nothing is left to prune")
    return operators, ignored


def _output_bytes(
    checkpoint: Checkpoint, operators: list[Operator], config: Config, pattern: _core.Pattern
) -> int:
    """Of all tensors as they will be stored, or somewhat more: formats are chosen by values."""
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    if config.format == "dense" or config.allocate:  # zeros are known in sum only
        return total
    for operator in operators:
        shape, dense = (operator.rows, operator.columns), checkpoint.tensors[operator.name].nbytes
        total += planned_bytes(operator.dtype, shape, config.pattern, pattern.sparsity) - dense
    return total


def _check_tensor(info: TensorInfo, shape: tuple[int, ...], pattern: _core.Pattern) -> None:
    if info.shape != shape:
        raise UsageError(
            f"{info.name}: expected shape {list(shape)} from config.json, found {list(info.shape)}"
        )
    if info.dtype not in FLOATS:
        expected = ", ".join(FLOATS)
        raise UsageError(f"{info.name}: expected dtype {expected}, found {info.dtype}")
    try:
        pattern.check(info.name, info.shape[1])
    except ValueError as error:
        raise UsageError(str(error)) from None


def _memory(
    skeleton: Skeleton,
    opening: Opening,
    inputs: Inputs,
    config: Config,
    operators: list[Operator],
) -> dict[str, int]:
    """Peak of anonymous memory by part.

    Products run in float32, one widened matrix at a time; a solver holds more than that.
    """
    layers = skeleton.layers
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    needs_dense = inputs.needs_dense or config.tune_block
    needs_own = inputs.propagate == "model" or inputs.true_sequential or config.tune_block
    grams = max(_gram_bytes(s, inputs, config) for s in opening.structures)
    width = max(g.width for s in opening.structures for g in s.groups)
    widest = max(p.numel() for layer in layers for p in layer.parameters() if p.dim() == 2)
    channels = skeleton.channels
    window = config.seq_len * channels * 4
    held = 1 if inputs.propagate == "model" else 2  # a layer's inputs; beside them its outputs
    if inputs.propagate == "model" and (inputs.target == "dense" or config.tune_block):
        held = 3
    matrices, squares = methods.get(config.method).workspace
    squares += int(inputs.target == "dense")  # a cross sum, while it is turned into a product
    routed = any(structure.experts for structure in opening.structures)
    paths = int(needs_dense) + int(needs_own)
    cached = (1 + int(needs_dense)) * (int(inputs.true_sequential) + int(routed))
    apart = 0 if needs_own else _pruned_bytes(skeleton, operators, experts=False)
    return {
        "python, torch and the model's structure": rss_anon(),
        "decoder layer (as stored)": skeleton.layer_bytes() * paths,
        "pruned weights until they are written": apart,
        "Grams": grams,
        "solver": max(1, matrices) * widest * 4 + width * width * 4 * squares,
        "tuning": _tuning_bytes(layer, width, channels, config),
        "budget": _budget_bytes(skeleton, operators, config),
        "activations of one window": window * 6 + config.seq_len * width * 4 * 4,
        "freed pages that the allocator keeps": KEPT_BYTES + 32 * 2**20,
        "routing": _routing_bytes(skeleton, config) * (1 + int(needs_dense)) if routed else 0,
        "hidden states": config.samples * window * (held + cached),
    }


def _pruned_bytes(skeleton: Skeleton, operators: list[Operator], *, experts: bool) -> int:
    """Of the largest layer, as stored: its experts, or all but them."""
    layers: Counter[int] = Counter()
    for operator in operators:
        if (operator.expert is not None) == experts:
            layers[operator.layer] += skeleton.checkpoint.tensors[operator.name].nbytes
    return max(layers.values(), default=0)


def _tuning_bytes(layer: int, width: int, channels: int, config: Config) -> int:
    """Leaf, gradients, moments and best state of a layer, and what backward passes remember."""
    if not config.tune_block:
        return 0
    threads = config.threads or _core.default_threads()
    side_by_side = min(threads, config.tune_batch)
    remembered = config.seq_len * (12 * channels + 6 * width) * 4
    return layer * 4 * (5 + side_by_side) + side_by_side * remembered


def _routing_bytes(skeleton: Skeleton, config: Config) -> int:
    """The numbers of the experts of every token, noted while a layer is pruned."""
    chosen = int(skeleton.config.get_text_config().num_experts_per_tok)
    return config.samples * config.seq_len * chosen * 4


def _budget_bytes(skeleton: Skeleton, operators: list[Operator], config: Config) -> int:
    """A layer pruned to three sparsities: in float32, experts as stored."""
    if not config.allocate:
        return 0
    layers: Counter[int] = Counter()
    for operator in operators:
        of_expert = operator.expert is not None
        nbytes = skeleton.checkpoint.tensors[operator.name].nbytes
        layers[operator.layer] += nbytes if of_expert else operator.rows * operator.columns * 4
    return 3 * max(layers.values())


def _gram_bytes(structure: LayerStructure, inputs: Inputs, config: Config) -> int:
    """Sums that are held at the same time: those of the stage that needs most."""
    kinds = 2 if config.heldout > 0 else 1
    drifts = inputs.true_sequential or inputs.propagate == "model"
    squares = 2.0 if inputs.target == "dense" and drifts else 0.5  # two halves and a whole, or one
    return max(
        sum(int(g.width * (g.width + GRAM_BLOCK) * squares) for g in stage.groups)
        for stage in structure.stages(sequential=inputs.true_sequential)
    ) * (GRAM_BYTES * kinds)


SPILLS = ("hidden states", "Grams")
"""Parts that may lie in a file, in the order in which they go there."""


def _fit(memory: dict[str, int], limit: int) -> tuple[int, tuple[str, ...]]:
    """The peak, and what must go to a file to stay below `limit`."""
    total = sum(memory.values())
    for count in range(len(SPILLS) + 1):
        peak = total - sum(memory[name] for name in SPILLS[:count])
        if peak <= limit:
            return peak, SPILLS[:count]
    parts = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in memory.items() if size)
    raise DoesNotFitError(
        f"memory {limit / 2**20:.0f} MiB: too small for this plan, which needs "
        f"{math.ceil(peak / 2**20)} MiB with {' and '.join(SPILLS)} in a file ({parts})",
        smallest=peak,
    )


def _check_disk(plan: Plan, out: Path | None, scratch: int) -> None:
    needed = plan.output_bytes + scratch - (finished_bytes(out) if out is not None else 0)
    if out is not None and needed > plan.disk_free:
        raise UsageError(
            f"output {out}: needs {needed} bytes on disk, found {plan.disk_free} bytes free"
        )


def _passes(inputs: Inputs, config: Config) -> str:
    """How often a layer is run over all windows; replays make later parts start midway."""
    parts = []
    if inputs.propagate == "layer" or inputs.target == "dense":
        again = inputs.true_sequential and inputs.target == "dense"
        parts.append("dense 1 whole + 1 partial" if again else "dense 1 whole")
    if inputs.true_sequential:
        parts.append("own 1 to the attention output + 1 of the MLP")
    elif inputs.propagate == "model":
        parts.append("own 1 to the last input")
    if inputs.propagate == "model":
        parts[-1] += " + 1 partial" if inputs.true_sequential else " + 1 whole"
    if config.allocate:
        parts.append("budget a few windows 4 times")
    elif config.method in ("pbs2p", "pbs2p-exact"):
        parts.append("choice of codes a few windows once")
    if config.tune_block:
        # A backward pass takes as long as two forward ones.
        passes = 3 * config.tune_steps * config.tune_batch / config.samples
        parts.append(f"tuning at most {passes:.0f} (forward and backward)")
    return ", ".join(parts)


def _warnings(skeleton: Skeleton, operators: list[Operator], config: Config) -> list[str]:
    calibration, _ = split_heldout(torch.empty(config.samples, 0), config.heldout)
    tokens = len(calibration) * config.seq_len
    shares = [skeleton.expert_share(index) for index in range(len(skeleton.layers))]
    worst = max(operators, key=lambda o: o.columns / (1.0 if o.expert is None else shares[o.layer]))
    share = 1.0 if worst.expert is None else shares[worst.layer]
    warnings = []
    if tokens * share < 2 * worst.columns:
        mean = "" if share == 1 else f"on average {tokens * share:.0f} of "
        warnings.append(
            f"{worst.name}: {mean}{tokens} calibration tokens are few for {worst.columns} input "
            f"channels; use at least {math.ceil(2 * worst.columns / share)}"
        )
    if config.memory is not None and config.memory > psutil.virtual_memory().total:
        warnings.append("memory: the bound is larger than the machine's memory")
    return warnings
