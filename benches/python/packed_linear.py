"""Packed linears against torch's dense ones, on equal threads.

    python benches/python/packed_linear.py                          # everything
    python benches/python/packed_linear.py --sizes 4096 --tokens 1 --formats "keep-of 2:4"

Prints Markdown. Every cell is `min / median / max` of torch's bfloat16 time over ours (or over
torch's float32 time), formed inside of a round; rounds are interleaved in one process. Inputs and
outputs are bfloat16 on both sides, so the casts of ours are in its time. Before anything is timed
all results are compared with a product in float64.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from rsprune import _core
from rsprune.packed_linear import PackedLinear
from rsprune.packing import PackedWeight

FORMATS = ("keep-of 2:4", "bitmap", "signs 2:8", "signs 3:8", "signs 3:4", "signs 4:8", "signs 8:8")
STORED = {"F16": torch.float16, "BF16": torch.bfloat16}
SCALE_COLUMNS = 256
PAUSE = 0.05  # seconds before a timing: idle threads of OpenMP spin for a while
TOLERANCE = {"torch bf16": 2e-2, "torch f32": 1e-2, "float32": 1e-2, "int8": 3e-2}
"""Relative to the norm of the product; outputs in bfloat16 alone cost 2e-3."""

Call = Callable[[], Tensor]
Clock = Callable[[], float]


def weight_of(form: str, size: int) -> Tensor:
    """A random dense weight in bfloat16 that the format holds."""
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(size, size, generator=generator)
    if form == "bitmap":
        return weight.where(torch.rand(size, size, generator=generator) < 0.5, 0.0).bfloat16()
    keep, of = map(int, form.split()[1].split(":"))
    places = torch.rand(size, size // of, of, generator=generator).argsort(-1)
    mask = (places < keep).reshape(size, size)
    if form.startswith("signs"):
        scales = 0.5 + torch.rand(size, size // SCALE_COLUMNS, generator=generator)
        scales = scales.bfloat16().float().repeat_interleave(SCALE_COLUMNS, 1)
        weight = torch.where(weight < 0, -scales, scales)
    return weight.where(mask, 0.0).bfloat16()


def packed_linear(form: str, weight: Tensor) -> PackedLinear:
    """The module that a loaded model has."""
    bits = weight.view(torch.uint16).numpy()
    if form == "bitmap":
        form = f"bitmap {np.count_nonzero(bits)}"
    packed = PackedWeight(form, "BF16", (weight.shape[0], weight.shape[1]))
    linear = PackedLinear(packed, None, "float32")
    for part, dtype, _ in packed.layout:
        values = torch.from_numpy(packed.pack(bits)[part])
        stored = values if dtype == "U8" else values.view(STORED[dtype])
        setattr(linear, part, nn.Parameter(stored, requires_grad=False))
    return linear.eval()


def contenders(form: str, size: int, tokens: int) -> dict[str, Call]:
    """What is timed; refuses where the results differ."""
    weight = weight_of(form, size)
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    dense, x32 = weight.float(), x.float()
    ours = packed_linear(form, weight)

    def in_mode(mode: str) -> Tensor:
        ours.compute = mode
        return ours(x)

    calls: dict[str, Call] = {
        "torch bf16": lambda: nn.functional.linear(x, weight),
        "torch f32": lambda: nn.functional.linear(x32, dense),
        "float32": lambda: in_mode("float32"),
    }
    if form.startswith("signs"):
        calls["int8"] = lambda: in_mode("int8")
    exact = x[:4].double() @ dense.double().T
    for name, call in calls.items():
        error = float((call()[:4].double() - exact).norm() / exact.norm())
        assert error < TOLERANCE[name], f"{form}, {name}: relative error {error:.1e}"
    return calls


def seconds(call: Call, sample: float, clock: Clock) -> float:
    """Of one call, repeated for `sample` seconds."""
    time.sleep(PAUSE)
    call()
    count, start = 0, clock()
    while (spent := clock() - start) < sample or count == 0:
        call()
        count += 1
    return spent / count


def cells(calls: dict[str, Call], rounds: int, sample: float, clock: Clock) -> dict[str, str]:
    """Speed-ups over torch bf16, and that one's own milliseconds."""
    times = [
        {name: seconds(call, sample, clock) for name, call in calls.items()} for _ in range(rounds)
    ]
    base = [1e3 * each["torch bf16"] for each in times]
    found = {"torch bf16": f"{min(base):.2f} / {median(base):.2f} / {max(base):.2f}"}
    for name in list(calls)[1:]:
        ratios = [each["torch bf16"] / each[name] for each in times]
        found[name] = f"{min(ratios):.2f} / {median(ratios):.2f} / {max(ratios):.2f}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 32, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", type=float, default=0.3, help="seconds of a timing")
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine; one thread")
    args = parser.parse_args()
    if args.cpu_time and args.threads != [1]:
        parser.error("--cpu-time: expected --threads 1, as threads that wait spend it too")
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, rsprune {_core.__version__}, kernel {_core.kernel_name()}\n")
    print("| format | size | tokens | threads | torch bf16, ms | torch f32 | float32 | int8 |")
    print("|---|---|---|---|---|---|---|---|")
    for form, size, tokens in itertools.product(args.formats, args.sizes, args.tokens):
        calls = contenders(form, size, tokens)
        for threads in args.threads:
            torch.set_num_threads(threads)
            row = cells(calls, args.rounds, args.sample, clock)
            values = [row.get(name, "") for name in TOLERANCE]
            shown = " | ".join([form, str(size), str(tokens), str(threads), *values])
            print(f"| {shown} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
