"""What a run would do, worked out from headers and shapes before any weight is read.

Everything that can be refused is refused here: pattern, dtype, disk, memory, output.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rsprune import _core, methods
from rsprune.checkpoint import FLOATS, Checkpoint, TensorInfo
from rsprune.config import Config
from rsprune.data import split_heldout
from rsprune.errors import UsageError
from rsprune.memory import memory_limit
from rsprune.memory_plan import fit, memory_parts, pruned_bytes
from rsprune.methods.base import Inputs
from rsprune.output import finished_bytes, free_bytes
from rsprune.packing import planned_bytes
from rsprune.skeleton import Skeleton
from rsprune.stream import Opening, Stream
from rsprune.unused import unused_options


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
    """The walk of a run. Sizes are in bytes.

    Attributes:
        spill: parts of `memory` that lie in files beside the output while it is made.
        spill_bytes: those files, and others of the run's own.
    """

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
    spill_bytes: int
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
    memory = memory_parts(skeleton, opening, inputs, config, operators)
    limit = config.memory or memory_limit()
    peak, spill = fit(memory, limit)
    scratch = 2 * pruned_bytes(skeleton, operators, experts=True)
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
        spill_bytes=scratch + sum(memory[name] for name in spill),
        passes=_passes(inputs, config),
        warnings=[*_warnings(skeleton, operators, config), *notes],
    )
    _check_disk(plan, out)
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
    method = methods.get(config.method)
    for operator in operators:
        shape, dense = (operator.rows, operator.columns), checkpoint.tensors[operator.name].nbytes
        if isinstance(method, methods.Binarizer):
            packed = math.ceil(method.most_bits(config) * math.prod(shape) / 8)
        else:
            packed = planned_bytes(operator.dtype, shape, config.pattern, pattern.sparsity)
        total += min(packed, dense) - dense
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


def _check_disk(plan: Plan, out: Path | None) -> None:
    needed = plan.output_bytes + plan.spill_bytes - (finished_bytes(out) if out is not None else 0)
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
        parts.append("budget a few windows once, two of them four times an operator")
    elif methods.differ(config):
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
    if warning := skeleton.beyond_context(config.seq_len):
        warnings.append(warning)
    if config.memory is not None and config.memory > psutil.virtual_memory().total:
        warnings.append("memory: the bound is larger than the machine's memory")
    return warnings
