"""Relative layer error of the binarizing methods on real matrices, against their true bits.

    python benches/python/binary_stages.py MODEL --calibration c4.jsonl [--layers 3 12 22]

q, o, up and down projections of the chosen decoder layers, dense inputs, 12 windows of 2,048 (10
for the solvers, 2 held out): the path of `layer_error.py`. Geometric means over the matrices; the
stages of `pbs2p-exact` are shown for every code.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rsprune import _core, methods
from rsprune.config import Config
from rsprune.data import calibration_windows, load_texts
from rsprune.methods.pbs2p_exact import CODES, Planes
from rsprune.plan import prepare
from rsprune.skeleton import load_tokenizer
from rsprune.survey import survey
from rsprune.windows import Split

LINEARS = ("q_proj", "o_proj", "up_proj", "down_proj")
STAGES = {
    "static": "signs and places once, published compensation",
    "compensated": "+ exact compensation",
    "greedy": "+ places by exact change",
    "search": "+ group-code search",
}
DAMPING = 0.01
Solve = Callable[[methods.Operator], dict[str, Any]]


def solvers() -> dict[str, tuple[str, Solve]]:
    """Row of the table -> pattern and solver."""
    found: dict[str, tuple[str, Solve]] = {}
    for code in CODES:
        planes = Planes.of(code)
        if planes.residual is not None:
            found[f"pbs2p-exact {code}"] = str(planes.pattern), residual(planes.residual)
            continue
        for stage, words in STAGES.items():
            found[f"pbs2p-exact {code}: {words}"] = code, exact(stage)
    for pattern in ("1:8", "2:8", "4:8", "5:8", "6:8"):  # the first two for their true bits
        found[f"pbs2p {pattern}"] = pattern, lambda op: _core.pbs2p(op, damping=DAMPING)[1]
    found["billm"] = "8:8", lambda op: _core.billm(op, damping=DAMPING)[1]
    found["arb"] = "8:8", lambda op: _core.arb(op, damping=DAMPING)[1]
    for bits in (2, 3, 4):
        found[f"gptq {bits}"] = "8:8", gptq(bits)
    return found


def exact(stage: str) -> Solve:
    return lambda op: _core.pbs2p_exact(op, damping=DAMPING, stage=stage)[1]


def residual(plane: _core.Pattern) -> Solve:
    def solve(op: methods.Operator) -> dict[str, Any]:
        second = dataclasses.replace(op, pattern=plane)
        return _core.pbs2p_residual(second, damping=DAMPING)[1]

    return solve


def gptq(bits: int) -> Solve:
    return lambda op: _core.gptq(op, damping=DAMPING, bits=bits)[1]


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 12, 22])
    parser.add_argument("--only", default="", help="methods whose row begins so")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=2048)
    args = parser.parse_args()
    held = max(2, args.samples // 8)
    config = Config(samples=args.samples, seq_len=args.seq_len)
    prepared = prepare(args.model, config, None)
    windows = calibration_windows(
        load_texts(args.calibration), load_tokenizer(args.model), samples=args.samples,
        seq_len=args.seq_len, seed=0,
    )  # fmt: skip
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    operators = {(o.layer, o.linear): o for o in prepared.plan.operators}
    split = Split(args.samples - held, held)
    for seen in survey(prepared, windows, split, _core.default_threads()):
        if seen.index not in args.layers:
            seen.outputs()
            continue
        for group, sums in seen.job.groups(seen.hidden, seen.hidden):
            for linear in (name for name in group.linears if name.endswith(LINEARS)):
                operator = operators[seen.index, linear]
                weight = prepared.checkpoint.lend(operator.name)
                for name, (pattern, solve) in solvers().items():
                    if not name.startswith(args.only):
                        continue
                    task = methods.Operator(
                        weight, operator.dtype, _core.Pattern(pattern, "row"), sums.calibration,
                        sums.heldout,
                    )  # fmt: skip
                    started = time.perf_counter()
                    certificate = solve(task)
                    rows[name].append({**certificate, "seconds": time.perf_counter() - started})
        if seen.index == max(args.layers):
            break
    count = len(next(iter(rows.values())))
    print(f"geometric means over {count} matrices of layers {args.layers}\n")
    print(
        "| method | true bits | nominal | error | held out | seconds |\n|---|---|---|---|---|---|"
    )
    for name, found in rows.items():
        error, heldout = (mean([c[key] for c in found]) for key in ("error", "heldout_error"))
        exact_bits, nominal = (
            sum(c[key] for c in found) / count for key in ("packed_bits", "nominal_bits")
        )
        seconds = sum(c["seconds"] for c in found)
        print(
            f"| {name} | {exact_bits:.3f} | {nominal:.2f} | {error:.4f} | {heldout:.4f} "
            f"| {seconds:.1f} |"
        )


if __name__ == "__main__":
    main()
