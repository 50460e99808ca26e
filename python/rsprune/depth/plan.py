"""What a depth run would do, worked out from headers and shapes; all refusals.

What is kept of every layer lies in files, so memory is that of a few layers however many there are.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsprune import _core
from rsprune.checkpoint import Checkpoint
from rsprune.config import Config
from rsprune.depth.cut import cut_config
from rsprune.depth.remove import Removal, parse_removal
from rsprune.depth.scores import METHODS, DepthMethod
from rsprune.errors import DoesNotFitError, UsageError
from rsprune.estimate import DISK_BYTES_PER_SECOND, Stage, measure_speeds
from rsprune.head import LOGIT_BYTES, Head
from rsprune.memory import KEPT_BYTES, memory_limit, rss_anon
from rsprune.output import finished_bytes, free_bytes
from rsprune.plan import Plan
from rsprune.skeleton import Skeleton
from rsprune.stream import Opening, Stream
from rsprune.unused import unused_depth_options


@dataclass(frozen=True)
class Opened:
    """An open model, for what asks about its layers.

    Attributes:
        stream: opened for the longer of the windows that will be run.
        warnings: about the length of these.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    stream: Stream
    opening: Opening
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, config: Config, tokens: int) -> Opened:
        """Opens a checkpoint; raises `UsageError` where it is none."""
        checkpoint = Checkpoint.open(folder)
        skeleton = Skeleton(
            checkpoint, device=config.device, trust_remote_code=config.trust_remote_code
        )
        skeleton.refuse_replaced()
        stream = Stream(skeleton)
        opening, warning = stream.open(tokens), skeleton.beyond_context(tokens)
        return cls(checkpoint, skeleton, stream, opening, (warning,) if warning else ())


@dataclass(frozen=True)
class Prepared:
    """A plan with the open objects that it was made from."""

    plan: Plan
    opened: Opened
    removal: Removal
    method: DepthMethod


def prepare(folder: Path, config: Config, out: Path | None) -> Prepared:
    """Opens the checkpoint and plans the run.

    Args:
        folder: of the model.
        config: the options.
        out: where the output would lie, to look at its disk.

    Raises:
        UsageError: naming the option or tensor, what was expected and what was found.
        DoesNotFitError: memory does not suffice.
    """
    method = METHODS[config.method]
    opened = Opened.of(folder, config, max(config.text_tokens, config.seq_len * config.fold))
    skeleton, layers = opened.skeleton, len(opened.skeleton.layers)
    removal = parse_removal(config, layers)
    kept = [index for index in range(layers) if index not in removal.candidates[: removal.count]]
    content = read_config_text(folder)
    cut_config(content, skeleton, kept, trust_remote_code=config.trust_remote_code)
    memory = memory_of(opened, config, gradients=method.gradients, fold=config.fold)
    limit = config.memory or memory_limit()
    scratch = scratch_bytes(opened, config, _levels(config.method, layers))
    gone = max(layer_bytes(opened)) * removal.count
    plan = Plan(
        model=folder,
        architecture=type(skeleton.model).__name__,
        layers=layers,
        operators=[],
        ignored=[],
        output_bytes=sum(t.nbytes for t in opened.checkpoint.tensors.values()) - gone,
        disk_free=free_bytes(out or folder),
        memory=list(memory.items()),
        peak_bytes=sum(memory.values()),
        memory_limit=limit,
        spill=("hidden states",),
        spill_bytes=scratch,
        passes=_passes(config, method, removal),
        warnings=[*unused_depth_options(config), *opened.warnings],
    )
    check_fits(memory, limit)
    if out is not None:
        needed = plan.output_bytes + scratch - finished_bytes(out)
        check_disk(out, needed, plan.disk_free)
    return Prepared(plan, opened, removal, method)


def read_config_text(folder: Path) -> dict[str, Any]:
    """The content of config.json, which has been found to be an object."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return content


def memory_of(opened: Opened, config: Config, *, gradients: bool, fold: bool) -> dict[str, int]:
    """Peak of anonymous memory by part.

    Args:
        opened: the model.
        config: the options.
        gradients: whether there are backward passes.
        fold: whether maps are folded.
    """
    skeleton, threads = opened.skeleton, config.threads or _core.default_threads()
    head = Head(opened.stream)
    channels, width = skeleton.channels, _width(opened)
    outer = sum(int(skeleton.model.get_parameter(n).numel()) for n in skeleton.outer_names())
    widest = max(p.numel() for layer in skeleton.layers for p in layer.parameters())
    tokens = max(config.text_tokens, config.seq_len if fold else 0)
    remembered = config.text_tokens * (12 * channels + 6 * width) if gradients else 0
    caught = 4 * config.text_tokens * _caught_channels(opened) if gradients else 0
    positions = head.chunk if opened.stream.takes_positions else tokens
    attention = skeleton.attention_bytes(tokens) * (3 if gradients else 1)
    logits = max(LOGIT_BYTES // 4, positions * head.piece)
    return {
        "python, torch and the model's structure": rss_anon(),
        "decoder layer (as stored)": skeleton.layer_bytes(),
        "before and after the layers": 4 * (outer + head.piece * head.width),
        "a matrix as float32": 4 * widest * threads,
        "activations": (4 * tokens * (6 * channels + 4 * width) + attention) * threads,
        "backward passes": 4 * (remembered + caught) * threads,
        "logits": 4 * logits * (4 if gradients else 3) * threads,
        "maps to be folded": _fold_bytes(opened) if fold else 0,
        "freed pages that the allocator keeps": KEPT_BYTES + 32 * 2**20,
    }


def _width(opened: Opened) -> int:
    return max(group.width for seen in opened.opening.structures for group in seen.groups)


def _caught_channels(opened: Opened) -> int:
    """What enters and leaves the linears of a layer, a token; of experts, a share of them."""
    skeleton, most = opened.skeleton, 0.0
    for index, seen in enumerate(opened.opening.structures):
        total = 0.0
        for group in seen.groups:
            share = 1.0 if group.expert is None else skeleton.expert_share(index)
            for linear in group.linears:
                weight = skeleton.layers[index].get_parameter(f"{linear}.weight")
                total += share * sum(weight.shape)
        most = max(most, total)
    return math.ceil(most)


def _fold_bytes(opened: Opened) -> int:
    """Sums of both kinds of windows in float32, a cross product and squares of it in float64, and
    a widened weight with its image."""
    square, width = opened.skeleton.channels**2, _width(opened)
    return 2 * 4 * 3 * square + 8 * 6 * square + 2 * 8 * opened.skeleton.channels * width


def layer_bytes(opened: Opened) -> list[int]:
    """What each layer takes on disk."""
    totals = [0] * len(opened.skeleton.layers)
    for name, info in opened.checkpoint.tensors.items():
        if (layer := opened.skeleton.layer_of(name)) is not None:
            totals[layer] += info.nbytes
    return totals


def _levels(method: str, layers: int) -> float:
    """Stores that scoring keeps, of two views of every text; one view is half a store."""
    if method in ("pip", "taylor"):
        return layers + 2  # what enters every layer, what leaves the last, gradients
    if method.startswith("perplexity"):
        return (layers + 1) / 2  # the model without each layer, and with all
    return 1


def survey_levels(layers: int) -> float:
    """The same of all metrics, one after another: no store is given back."""
    return sum(_levels(method, layers) for method in ("pip", "perplexity", "bi"))


def scratch_bytes(opened: Opened, config: Config, levels: float) -> int:
    """Files of hidden states: so many stores of texts, and those of maps to be folded."""
    state = 4 * opened.skeleton.channels
    texts = math.ceil(2 * config.texts * config.text_tokens * state * levels)
    fold = 4 * config.samples * config.seq_len * state if config.fold else 0
    return texts + fold


def check_fits(memory: dict[str, int], limit: int) -> None:
    """Raises `DoesNotFitError` where the parts add up to more than `limit`."""
    peak = sum(memory.values())
    if peak > limit:
        parts = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in memory.items() if size)
        raise DoesNotFitError(
            f"memory {limit / 2**20:.0f} MiB: too small for this plan, which needs "
            f"{math.ceil(peak / 2**20)} MiB ({parts})",
            smallest=peak,
        )


def check_disk(where: Path, needed: int, free: int) -> None:
    """Raises `UsageError` where `needed` bytes are more than are free."""
    if needed > free:
        raise UsageError(
            f"{where}: needs {needed} bytes on disk, files of hidden states included, found {free} "
            "bytes free"
        )


def _passes(config: Config, method: DepthMethod, removal: Removal) -> str:
    """How often texts go through the model."""
    times = removal.count if method.iterated else 1
    what = {
        "pip": "forward and backward with two views",
        "taylor": "forward and backward",
        "bi": "forward",
        "random": "nothing",
    }.get(config.method, "forward without each layer")
    fold = ", forward dense and pruned to fold maps" if config.fold else ""
    return f"{what}, {times} times, over {config.texts} texts of {config.text_tokens} tokens{fold}"


def estimate(prepared: Prepared, config: Config) -> tuple[Plan, list[Stage]]:
    """The plan beside what every stage takes, from shapes and the speed measured now.

    A backward pass takes its layer's forward again, a product for the gradient of its inputs and
    one for the sizes of the weights' gradients: three forwards.
    """
    plan, opened, removal = prepared.plan, prepared.opened, prepared.removal
    speeds = measure_speeds(config.threads or _core.default_threads())
    work = _forward_work(opened)
    texts, layers = config.texts * config.text_tokens, plan.layers
    times = removal.count if prepared.method.iterated else 1
    each = {"pip": 2 * 4.0, "taylor": 4.0, "bi": 1.0, "random": 0.0}.get(config.method, layers / 2)
    disk = sum(info.nbytes for info in opened.checkpoint.tensors.values())
    peak = plan.peak_bytes
    stages = [
        Stage("read and check", disk / DISK_BYTES_PER_SECOND, disk, 0, peak),
        Stage("score", times * each * texts * work / speeds.forward, times * 2 * disk, 0, peak),
    ]
    if config.fold:
        tokens = 2 * config.samples * config.seq_len
        stages.append(Stage("fold", tokens * work / speeds.forward, disk, 0, peak))
    stages.append(Stage("write", disk / DISK_BYTES_PER_SECOND, disk, plan.output_bytes, peak))
    return plan, stages


def _forward_work(opened: Opened) -> float:
    """Operations of a token's forward pass through all layers."""
    work = 0.0
    for index, seen in enumerate(opened.opening.structures):
        for group in seen.groups:
            share = 1.0 if group.expert is None else opened.skeleton.expert_share(index)
            for linear in group.linears:
                parameter = opened.skeleton.layers[index].get_parameter(f"{linear}.weight")
                work += 2 * share * parameter.numel()
    return work
