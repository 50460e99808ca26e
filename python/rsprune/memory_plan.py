"""The peak of anonymous memory, part by part and stage by stage, worked out from shapes.

    peak of a stage = sum of the parts that are held in it, less those that lie in a file
    peak of a run   = the largest of them

Files have no name; their pages are the system's to write back, and do not count as anonymous. What
lies there has the bits that it has in memory, so no result depends on the bound.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from rsprune import _core, methods
from rsprune.blocks import LayerStructure
from rsprune.config import Config
from rsprune.data import text_bytes
from rsprune.errors import DoesNotFitError
from rsprune.memory import KEPT_BYTES, rss_anon
from rsprune.methods.base import SURVEYED, Inputs
from rsprune.skeleton import Skeleton
from rsprune.stream import Opening
from rsprune.windows import FEW

GRAM_BYTES = 4
"""Sums are kept in float32, symmetric ones up to their diagonal."""

GRAM_BLOCK = 112
"""Rows that end at the same column."""

ROW_BLOCK = 98
"""Rows of a weight that one thread of a solver works on."""

BLOCK_ARRAYS = 8
"""float32 arrays that it holds of them: points, gradients, residuals, packed rows."""

HOLES = 96 * 2**20
"""Freed memory between live arrays, which the allocator cannot give back: `best` on SmolLM2-135M
stood 50 MiB higher after six layers than after one, and then no higher; `fista-plus` at the shape
of Llama 3 8B stood 25 MiB above a plan with 64."""

SPILLS = ("hidden states", "Grams", "solver's matrices")
"""Parts that may lie in a file, in the order in which they go there."""

RUNS = ("allocate", "calibrate", "solve", "tune", "propagate", "write")
"""Stages that have a decoder layer in memory."""

STAGES = ("read and check", *RUNS)

HELD_IN: dict[str, tuple[str, ...]] = {
    "decoder layer (as stored)": RUNS,
    "pruned weights until they are written": RUNS,
    "Grams": ("allocate", "calibrate", "solve"),
    "solver": ("allocate", "solve"),
    "solver's matrices": ("allocate", "solve"),
    "tuning": ("tune",),
    "budget": ("allocate",),
    "activations of one window": ("allocate", "calibrate", "tune", "propagate"),
    "routing": RUNS,
    "hidden states": RUNS,
    "calibration texts": ("read and check",),
}
"""The stages in which a part is held; others are held in all."""

OPTIONAL = {"allocate": "budget", "tune": "tuning"}
"""Stages that a run may be without, by the part that they alone hold."""


class Operator(Protocol):
    """What is asked of a linear that will be pruned; `plan.Operator` has it."""

    @property
    def name(self) -> str:
        """Of its weight on disk."""
        ...

    @property
    def layer(self) -> int:
        """Number of its decoder layer."""
        ...

    @property
    def rows(self) -> int:
        """Outputs."""
        ...

    @property
    def columns(self) -> int:
        """Inputs."""
        ...

    @property
    def expert(self) -> int | None:
        """Number of its expert."""
        ...


def memory_parts(
    skeleton: Skeleton,
    opening: Opening,
    inputs: Inputs,
    config: Config,
    operators: Sequence[Operator],
) -> dict[str, int]:
    """Bytes of anonymous memory by part; a stage holds those that `HELD_IN` says."""
    layers = skeleton.layers
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    needs_dense = inputs.needs_dense or config.tune_block
    needs_own = inputs.propagate == "model" or inputs.true_sequential or config.tune_block
    grams = max(_gram_bytes(s, inputs, config.heldout > 0) for s in opening.structures)
    if config.allocate or config.method == "pbs2p-exact":  # a look at the dense model sums too
        looks = (_gram_bytes(s, SURVEYED, config.samples > 1) for s in opening.structures)
        grams = max(grams, *looks)
    width = max(g.width for s in opening.structures for g in s.groups)
    widest = max(p.numel() for layer in layers for p in layer.parameters() if p.dim() == 2)
    channels = skeleton.channels
    window = config.seq_len * channels * 4
    held = 1 if inputs.propagate == "model" else 2  # a layer's inputs; beside them its outputs
    if inputs.propagate == "model" and (inputs.target == "dense" or config.tune_block):
        held = 3
    routed = any(structure.experts for structure in opening.structures)
    paths = int(needs_dense) + int(needs_own)
    cached = (1 + int(needs_dense)) * (int(inputs.true_sequential) + int(routed))
    apart = 0 if needs_own else pruned_bytes(skeleton, operators, experts=False)
    return {
        "python, torch and the model's structure": rss_anon(),
        # Widened for products one matrix at a time.
        "decoder layer (as stored)": skeleton.layer_bytes() * paths,
        "pruned weights until they are written": apart + _coded_bytes(operators, config),
        "Grams": grams,
        "solver": max(_resident_bytes(skeleton, operator, config) for operator in operators),
        "solver's matrices": max(_matrix_bytes(operator, config) for operator in operators),
        "tuning": _tuning_bytes(layer, width, skeleton, config),
        "budget": _budget_bytes(skeleton, operators, config, routed=routed),
        "activations of one window": _activation_bytes(window, width, inputs, config)
        + skeleton.attention_bytes(config.seq_len)
        + widest * 4,
        "freed pages that the allocator keeps": KEPT_BYTES + HOLES,
        "routing": _routing_bytes(skeleton, config) * (1 + int(needs_dense)) if routed else 0,
        "hidden states": config.samples * window * (held + cached),
        "calibration texts": text_bytes(config.calibration),
    }


def _activation_bytes(window: int, width: int, inputs: Inputs, config: Config) -> int:
    """Of one window in a layer, in float32, and what is made of a linear's inputs for sums.

    Beside the inputs of both paths there is their blend, and the scaled copies of what is clipped.
    """
    copies = 2 * inputs.corrected + (inputs.clip_tokens > 0) * (1 + inputs.corrected)
    return window * 6 + config.seq_len * width * 4 * (4 + copies)


def _resident_bytes(skeleton: Skeleton, operator: Operator, config: Config) -> int:
    """What a solver holds whatever the bound: squares in use, codes, row blocks, stored weights."""
    rows, columns = operator.rows, operator.columns
    spaces = methods.workspaces(config, columns)
    squares, kept = max(w.resident for w in spaces), max(w.kept for w in spaces)
    threads = config.threads or _core.default_threads()
    blocks = min(threads, math.ceil(rows / ROW_BLOCK)) * BLOCK_ARRAYS * ROW_BLOCK * columns
    stored = 3 * skeleton.checkpoint.tensors[operator.name].nbytes  # before, after, polished
    return (squares * columns**2 + kept * rows * columns + blocks) * 4 + stored


def _matrix_bytes(operator: Operator, config: Config) -> int:
    rows, columns = operator.rows, operator.columns
    return max(
        4 * (w.matrices * rows * columns + w.squares * columns**2)
        for w in methods.workspaces(config, columns)
    )


def pruned_bytes(skeleton: Skeleton, operators: Sequence[Operator], *, experts: bool) -> int:
    """Of the largest layer, as stored: its experts, or all but them."""
    layers: Counter[int] = Counter()
    for operator in operators:
        if (operator.expert is not None) == experts:
            layers[operator.layer] += skeleton.checkpoint.tensors[operator.name].nbytes
    return max(layers.values(), default=0)


def _coded_bytes(operators: Sequence[Operator], config: Config) -> int:
    """The packed forms of a layer that a method gives beside its weights, where it gives any."""
    method = methods.get(config.method)
    if config.format != "packed" or not isinstance(method, methods.Binarizer):
        return 0
    layers: Counter[int] = Counter()
    for operator in operators:
        layers[operator.layer] += operator.rows * operator.columns
    return math.ceil(max(layers.values(), default=0) * method.kept_bits(config) / 8)


def _tuning_bytes(layer: int, width: int, skeleton: Skeleton, config: Config) -> int:
    """Leaf, gradients, moments and best state of a layer, and what backward passes remember."""
    if not config.tune_block:
        return 0
    threads = config.threads or _core.default_threads()
    side_by_side = min(threads, config.tune_batch)
    # Remembered for the backward pass, and its own: SmolLM2-135M stood 131 MiB above 12 and 6.
    remembered = config.seq_len * (24 * skeleton.channels + 8 * width) * 4
    remembered += 2 * skeleton.attention_bytes(config.seq_len)
    return layer * 4 * (5 + side_by_side) + side_by_side * remembered


def _routing_bytes(skeleton: Skeleton, config: Config) -> int:
    """The numbers of the experts of every token, noted while a layer is pruned."""
    chosen = int(skeleton.config.get_text_config().num_experts_per_tok)
    return config.samples * config.seq_len * chosen * 4


def _budget_bytes(
    skeleton: Skeleton, operators: Sequence[Operator], config: Config, *, routed: bool
) -> int:
    """Stores of a few windows, and a layer pruned to three sparsities, as it is stored."""
    if not methods.differ(config):
        return 0
    stores = (
        (3 if routed else 2)
        * min(FEW.count, config.samples)
        * config.seq_len
        * skeleton.channels
        * 4
    )
    if not config.allocate:
        return stores
    layers: Counter[int] = Counter()
    for operator in operators:
        layers[operator.layer] += skeleton.checkpoint.tensors[operator.name].nbytes
    return stores + 3 * max(layers.values())


def _gram_bytes(structure: LayerStructure, inputs: Inputs, judged: bool) -> int:
    """Sums that are held at the same time: those of the stage that needs most."""
    kinds = 2 if judged else 1
    squares = 2.0 if inputs.corrected else 0.5  # two halves and a whole, or one
    return max(
        sum(int(g.width * (g.width + GRAM_BLOCK) * squares) for g in stage.groups)
        for stage in structure.stages(sequential=inputs.true_sequential)
    ) * (GRAM_BYTES * kinds)


def stage_peaks(memory: dict[str, int], spill: Sequence[str] = ()) -> dict[str, int]:
    """Bytes of anonymous memory in every stage of the run, with the parts of `spill` in a file."""
    return {
        stage: sum(
            size
            for part, size in memory.items()
            if stage in HELD_IN.get(part, STAGES) and part not in spill
        )
        for stage in STAGES
        if memory.get(OPTIONAL.get(stage, ""), 1)
    }


def fit(memory: dict[str, int], limit: int) -> tuple[int, tuple[str, ...]]:
    """The peak, and what must go to a file to stay below `limit`.

    Raises:
        DoesNotFitError: naming the smallest bound that would do.
    """
    for count in range(len(SPILLS) + 1):
        peak = max(stage_peaks(memory, SPILLS[:count]).values())
        if peak <= limit:
            return peak, SPILLS[:count]
    parts = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in memory.items() if size)
    raise DoesNotFitError(
        f"memory {limit / 2**20:.0f} MiB: too small for this plan, which needs "
        f"{math.ceil(peak / 2**20)} MiB with {' and '.join(SPILLS)} in a file ({parts})",
        smallest=peak,
    )
