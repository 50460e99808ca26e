"""Relative layer error of every solver on 12 real matrices, SparseGPT = 1.

    python benches/python/layer_error.py MODEL --calibration c4.jsonl

q, o, up and down projections of decoder layers 3, 12 and 22, dense inputs, 12 windows of 2,048 (10
for the solvers, 2 held out): the matrices that design figures of this project refer to. With
`--samples 32` 28 and 4.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from rsprune import _core, methods
from rsprune.blocks import Group
from rsprune.calibrate import GroupStatistics, LayerJob
from rsprune.config import Config
from rsprune.data import calibration_windows, load_texts
from rsprune.methods.base import Inputs
from rsprune.plan import Prepared, prepare
from rsprune.skeleton import load_tokenizer
from rsprune.timing import Timing
from rsprune.windows import Split, Windows

LAYERS = (3, 12, 22)
LINEARS = ("q_proj", "o_proj", "up_proj", "down_proj")
FISTA = {"iterations": 20, "xi": 0.3, "patience": 3, "lambda_start": 0.01, "damping": 0.01}
PLUS = {"iterations": 20, "xi": 0.3, "patience": 3, "lambda_start": 0.05, "floor": None}
SOLVERS = {
    "sparsegpt": lambda op: _core.sparsegpt(op, damping=0.01),
    "magnitude": _core.magnitude,
    "wanda": _core.wanda,
    "fista from wanda": lambda op: _core.fista(op, warm_start="wanda", **FISTA),
    "fista from sparsegpt": lambda op: _core.fista(op, warm_start="sparsegpt", **FISTA),
    "sparsegpt, refit": lambda op: polished(op, search=False),
    "sparsegpt, refit, search": lambda op: polished(op, search=True),
    "fista-plus": lambda op: _core.fista_plus(op, **PLUS),
    "admm, published": lambda op: _core.admm(op, damping=0.01, slow=False),
    "admm, slow": lambda op: _core.admm(op, damping=0.01, slow=True),
    "best": lambda op: _core.best(op, budget=1116),
}


def polished(operator: methods.Operator, *, search: bool) -> methods.Pruned:
    """SparseGPT with what may follow any method."""
    weight, _ = _core.sparsegpt(operator, damping=0.01)
    return _core.polish(operator, weight, refit=True, search=search)


def groups(
    prepared: Prepared, windows: torch.Tensor, split: Split
) -> Iterator[tuple[int, Group, GroupStatistics]]:
    """Sums of every group of the chosen layers, on the dense model's hidden states."""
    skeleton, stream = prepared.skeleton, prepared.stream
    stores = [Windows(len(windows), windows.shape[1], skeleton.channels) for _ in range(2)]
    for window, hidden in enumerate(stream.embed(windows)):
        stores[0].put(window, hidden)
    for index in range(max(LAYERS) + 1):
        skeleton.load_layer(index)
        job = LayerJob(
            layer=skeleton.layers[index], structure=prepared.opening.structures[index],
            kwargs=stream.kwargs(index), inputs=Inputs("layer", "own", False), split=split,
            threads=_core.default_threads(), store=lambda kind, channels: stores[1],
            pool=skeleton.pool, where=f"layer {index}", timing=Timing(),
        )  # fmt: skip
        for group, sums in job.groups(stores[0], stores[0]):
            if index in LAYERS:
                yield index, group, sums
        job.advance()
        skeleton.drop_layer(index)
        stores.reverse()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    args = parser.parse_args()
    held = max(2, args.samples // 8)
    split = Split(args.samples - held, held)
    prepared = prepare(args.model, Config(samples=args.samples, pattern=args.pattern), None)
    windows = calibration_windows(
        load_texts(args.calibration), load_tokenizer(args.model), samples=args.samples,
        seq_len=2048, seed=0,
    )  # fmt: skip
    logs: dict[str, list[tuple[float, float]]] = {
        name: [] for name in dict.fromkeys(["sparsegpt", *args.solvers])
    }
    for index, group, sums in groups(prepared, windows, split):
        for linear in group.linears:
            if not linear.endswith(LINEARS):
                continue
            name = prepared.skeleton.disk_name(
                prepared.skeleton.layer_name(index, f"{linear}.weight")
            )
            operator = methods.Operator(
                prepared.checkpoint.lend(name), prepared.checkpoint.tensors[name].dtype,
                _core.Pattern(args.pattern, "matrix"), sums.calibration, sums.heldout,
            )  # fmt: skip
            for solver, found in logs.items():
                certificate = SOLVERS[solver](operator)[1]
                errors = certificate["error"], certificate["heldout_error"]
                found.append(tuple(map(math.log, errors)))
    print(f"{args.pattern}, geometric mean over 12 matrices, SparseGPT = 1\n")
    print("| solver | calibration | held out |\n|---|---|---|")
    for solver, values in logs.items():
        ratios = [
            math.exp(sum(a[k] - b[k] for a, b in zip(values, logs["sparsegpt"], strict=True)) / 12)
            for k in (0, 1)
        ]
        print(f"| {solver} | {ratios[0]:.3f} | {ratios[1]:.3f} |")


if __name__ == "__main__":
    main()
