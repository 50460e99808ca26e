"""How long a run will take, and what it reads and writes, stage by stage.

    seconds = work counted from shapes / speed measured in two seconds on this machine, as it is now

Work: a forward pass of a layer is `2 P T` for its weights and `2 T^2 C` for causal attention, T
tokens and C channels a window (an expert's weights count for the tokens that it sees); a Gram is
`n^2` a token; a solver's step is `2 m n^2`, of which a method takes `products`. Good to a factor of
about two: a busy machine moves it more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from rsprune import _core, methods
from rsprune.allocate import GRID, unit_of
from rsprune.codes import ROWS
from rsprune.config import Config
from rsprune.experts import ExpertLinear
from rsprune.memory_plan import stage_peaks
from rsprune.methods.base import Inputs
from rsprune.methods.pbs2p_exact import DEFAULT_BITS, measured_codes
from rsprune.plan import Plan, Prepared
from rsprune.skeleton import Skeleton
from rsprune.windows import FEW

PROBE_SECONDS = 0.7
PROBE_WIDTH = 1024
DISK_BYTES_PER_SECOND = 500e6
"""Assumed, not measured: a benchmark of a disk measures its cache."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run; bytes read and written are those that pass the disk, `peak` is memory."""

    name: str
    seconds: float
    reads: int
    writes: int
    peak: int


@dataclass(frozen=True)
class Speeds:
    """Floating-point operations per second of forward passes and of the solvers."""

    forward: float
    solver: float


def measure_speeds(threads: int) -> Speeds:
    """Runs a product of each kind for under a second."""
    torch.set_num_threads(threads)
    n = PROBE_WIDTH
    x = torch.ones(n, n)
    sums, rows = _core.Statistics(n), np.ones((n, n), dtype=np.float32)
    forward = _rate(lambda: torch.mm(x, x), 2 * n**3)
    solver = _rate(lambda: sums.add(rows, threads=threads), n**3)
    return Speeds(forward, solver)


def _rate(call: Callable[[], object], work: int) -> float:
    call()
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < PROBE_SECONDS or count == 0:
        call()
        count += 1
    return count * work / max(elapsed, 1e-9)


def stages(prepared: Prepared, config: Config, speeds: Speeds) -> list[Stage]:
    """The stages in the order in which a run comes to them."""
    plan, inputs = prepared.plan, prepared.inputs
    forward = _forward_work(prepared, config) * plan.layers / speeds.forward
    calibrate, propagate = _passes(inputs)
    tokens = config.samples * config.seq_len
    grams = sum(
        group.width**2 * tokens * _sums(inputs) * (1.0 if group.expert is None else share)
        for index, structure in enumerate(prepared.opening.structures)
        for share in (prepared.skeleton.expert_share(index),)
        for group in structure.groups
    )
    products = methods.get(config.method).products(config)
    steps = sum(2 * o.rows * o.columns**2 for o in plan.operators)
    weights = sum(prepared.checkpoint.stored_bytes(n) for n in prepared.checkpoint.tensors)
    memory = dict(plan.memory)
    spilled = sum(memory[name] for name in plan.spill)
    peaks = stage_peaks(memory, plan.spill)

    def stage(name: str, seconds: float, reads: int, writes: int) -> Stage:
        return Stage(name, seconds, reads, writes, peaks[name.partition(",")[0]])

    found = [
        stage("read and check", weights / DISK_BYTES_PER_SECOND, weights, 0),
        stage(
            "calibrate",
            calibrate * forward + grams / speeds.solver,
            weights + spilled * plan.layers,
            spilled * plan.layers,
        ),
        stage("solve", products * steps / speeds.solver, weights, 0),
        stage("propagate", propagate * forward, 0, 0),
        stage("write", plan.output_bytes / DISK_BYTES_PER_SECOND, 0, plan.output_bytes),
    ]
    if methods.differ(config):
        seconds = 2 * min(FEW.count, config.samples) / config.samples * forward
        if config.method == "pbs2p-exact":
            codes = measured_codes(
                config.bits or DEFAULT_BITS, [(o.rows, o.columns) for o in plan.operators]
            )
            tried = sum(2 * min(o.rows, ROWS) * o.columns**2 for o in plan.operators)
            seconds += len(codes) * products * tried / speeds.solver
        if config.allocate:
            seconds += len(GRID) * methods.get("sparsegpt").products(config) * steps / speeds.solver
            runs = 1 + len(GRID) * len({unit_of(o) for o in plan.operators}) / plan.layers
            seconds += runs * FEW.heldout / config.samples * forward
        found.insert(1, stage("allocate", seconds, weights, 0))
    if config.tune_block:
        # Backward is two forward passes; a window is judged once a pass over all.
        tuned = 3.2 * config.tune_steps * config.tune_batch / config.samples * forward
        found.insert(-2, stage("tune, at most", tuned, 0, 0))
    return found


def _forward_work(prepared: Prepared, config: Config) -> float:
    """Operations of the largest layer on all windows."""
    skeleton = prepared.skeleton
    weights = max(_weights_used(skeleton, index) for index in range(len(skeleton.layers)))
    window = 2 * weights * config.seq_len + 2 * config.seq_len**2 * skeleton.channels
    return float(window * config.samples)


def _weights_used(skeleton: Skeleton, index: int) -> float:
    """Weights of a layer that a token meets."""
    layer, share = skeleton.layers[index], skeleton.expert_share(index)
    lent = sum(m.weight.numel() for m in layer.modules() if isinstance(m, ExpertLinear))
    return sum(p.numel() for p in layer.parameters()) - (1 - share) * lent


def _passes(inputs: Inputs) -> tuple[float, float]:
    """Whole runs over the windows to calibrate and to propagate, as counted on Llama layers."""
    if inputs.needs_dense:
        return (2.6 if inputs.true_sequential else 1.0), float(inputs.propagate == "model")
    return (1.3 if inputs.true_sequential else 0.75), 1.0


def _sums(inputs: Inputs) -> float:
    """Products that are summed, in halves of a square."""
    return 4.0 if inputs.target == "dense" and inputs.true_sequential else 1.0


def total(found: list[Stage]) -> Stage:
    """All stages together."""
    return Stage(
        "together",
        sum(stage.seconds for stage in found),
        sum(stage.reads for stage in found),
        sum(stage.writes for stage in found),
        max(stage.peak for stage in found),
    )


def estimate(prepared: Prepared, config: Config) -> tuple[Plan, list[Stage]]:
    """The plan with its stages; takes about two seconds."""
    speeds = measure_speeds(config.threads or _core.default_threads())
    return prepared.plan, stages(prepared, config, speeds)
