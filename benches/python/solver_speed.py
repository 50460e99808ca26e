"""Solvers and Gram sums against the same work in torch and NumPy, on equal threads.

    python benches/python/solver_speed.py                  # all sizes, 1 and 2 threads
    python benches/python/solver_speed.py --sizes 576 --threads 1 --parts step gram
    python benches/python/solver_speed.py --quick          # n = 64: does the script still work?

Prints Markdown. Every cell is `min / median / max` over interleaved rounds of one process; ratios
are formed inside of a round. Results are compared before anything is timed. Every thread count is
a process of its own, as OpenBLAS takes its number of threads from the environment.

Problems are random, with the channel scales of real inputs; the shapes are those of real layers.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch_solvers import TorchFista, torch_sparsegpt, two_of_four

from rsprune import _core
from rsprune.methods import Operator

SHAPES = {
    64: (96, "none, --quick"),
    576: (1536, "SmolLM2-135M gate, up"),
    1536: (576, "SmolLM2-135M down"),
    2048: (2048, "TinyLlama-1.1B q, o"),
    4096: (1024, "Llama-3-8B k, v"),
}
"""Rows by columns, and where they are found."""
CURVE_ROWS = 1536
PARTS = ("step", "fista", "sparsegpt", "gram", "curve")
TOKENS = 2048
FISTA: dict[str, Any] = {
    "warm_start": "wanda", "iterations": 20, "xi": 0.3, "patience": 3, "lambda_start": 0.01,
    "damping": 0.01,
}  # fmt: skip
ONE_ROUND = {**FISTA, "xi": 1e9, "lambda_start": 1.5e-6}
"""lambda only falls, and leaves its range after the first round."""
EFFORTS = ((1, 2, 0), (1, 5, 1), (4, 5, 5), (12, 20, 20))
"""Rounds, iterations of a round and polish steps that FISTA-plus is tried with, cheapest first."""
PAUSE = 0.1  # seconds before a timing: idle threads of OpenMP and OpenBLAS spin for a while
SAMPLE = 0.3  # seconds that a timing lasts at least, by repetition

Calls = dict[str, Callable[[], Any]]
Times = dict[str, list[float]]
Check = Callable[[dict[str, Any]], list[float]]


def batches(n: int, tokens: int) -> Iterator[np.ndarray]:
    """Inputs as layers have them: correlated, heavy-tailed channel scales; [TOKENS, n] each."""
    rng = np.random.default_rng(n)
    noise = partial(rng.standard_normal, dtype=np.float32)
    decay = (1 + np.arange(n, dtype=np.float32)) ** -0.5
    mix, scale = noise((n, n)), np.exp(0.8 * noise(n))
    for _ in range(0, tokens, TOKENS):
        yield (noise((TOKENS, n)) * decay @ mix + 0.3 * noise((TOKENS, n))) * scale


@dataclass(frozen=True)
class Problem:
    """One operator for the core; the same as tensors for torch."""

    operator: Operator
    weight: torch.Tensor
    gram: torch.Tensor

    @classmethod
    def random(cls, m: int, n: int, pattern: str = "2:4") -> Problem:
        sums = _core.Statistics(n)
        for x in batches(n, 2 * n):
            sums.add(x)
        rng = np.random.default_rng([m, n])
        weight = (rng.standard_t(5, (m, n)) / math.sqrt(n)).astype(np.float32)
        wanted = _core.Pattern(pattern, "matrix")
        gram = torch.from_numpy(sums.gram()).float()
        operator = Operator(weight, "F32", wanted, sums, None)
        return cls(operator, torch.from_numpy(weight), gram)

    def error(self, values: torch.Tensor) -> float:
        """The relative error of `values` in float64, which judges both sides."""
        gram, weight = self.gram.double(), self.weight.double()
        moved = values.double() - weight
        return float(((moved @ gram) * moved).sum() / ((weight @ gram) * weight).sum())


def race(args: argparse.Namespace, calls: Calls, check: Check) -> tuple[Times, list[float]]:
    """Runs every call once, checks the results, then times interleaved rounds of them.

    Returns seconds by name, and what `check` returned: the errors, ours first.
    """
    results, repeats = {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        results[name] = call()
        repeats[name] = 1 + int(args.sample / (time.perf_counter() - start))
    errors = check(results)
    times: Times = {name: [] for name in calls}
    for index in range(args.rounds):
        for name in list(calls)[:: 1 if index % 2 == 0 else -1]:
            time.sleep(PAUSE)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times, errors


def require(close: bool, what: str, *values: float) -> None:
    if not close:
        raise SystemExit(f"results differ, nothing was timed: {what}: {values}")


def spread(values: list[float], unit: float = 1.0, digits: int = 3) -> str:
    """`min / median / max` in units of `unit`."""
    figures = (min(values), median(values), max(values))
    return " / ".join(f"{value / unit:.{digits}g}" for value in figures)


def ratios(above: list[float], below: list[float]) -> str:
    return spread([a / b for a, b in zip(above, below, strict=True)])


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def table(title: str, *heads: str) -> None:
    print(f"\n### {title}\n")
    row(*heads)
    print("|---" * len(heads) + "|")


def one_round(problem: Problem, steps: int, threads: int) -> float:
    """The error of the core's FISTA after exactly one round of `steps`."""
    options = {**ONE_ROUND, "iterations": steps}
    certificate = _core.fista(problem.operator, **options, threads=threads)[1]
    require(certificate["rounds"] == 1, "rounds", certificate["rounds"])
    return certificate["error"]


def check_step(problem: Problem, results: dict[str, Any]) -> list[float]:
    points = [results[form] for form in ("fused", "literal")]
    found = [results["ours"], *(problem.error(p * two_of_four(p)) for p in points)]
    require(found[0] < results["around"], "a round must gain", found[0], results["around"])
    require(max(found) < min(found) * 1.001, "errors after a round", *found)
    return found[:2]


def bench_step(args: argparse.Namespace, threads: int) -> None:
    steps = FISTA["iterations"]
    table(f"FISTA step (one round of {steps}, less what surrounds them)", "n", "m", "ours ms",
          "torch fused ms", "torch literal ms", "fused / ours", "literal / ours",
          "error ours", "torch")  # fmt: skip
    for n in args.sizes:
        problem = Problem.random(SHAPES[n][0], n)
        fused, literal = (
            TorchFista(problem.weight, problem.gram, form) for form in ("fused", "literal")
        )
        start, _ = fused.prepare(), literal.prepare()
        penalty = ONE_ROUND["lambda_start"] * float(problem.weight.square().mean().sqrt())
        calls: Calls = {
            "ours": partial(one_round, problem, steps, threads),
            "around": partial(one_round, problem, 0, threads),
            "fused": partial(fused.iterate, start, penalty, steps),
            "literal": partial(literal.iterate, start, penalty, steps),
        }
        times, errors = race(args, calls, partial(check_step, problem))
        ours = [a - b for a, b in zip(times["ours"], times["around"], strict=True)]
        cells = [spread(t, steps / 1e3) for t in (ours, times["fused"], times["literal"])]
        pairs = [ratios(times[form], ours) for form in ("fused", "literal")]
        row(n, SHAPES[n][0], *cells, *pairs, *map("{:.5f}".format, errors))


def rivals(problem: Problem, goal: float, threads: int) -> Calls:
    """Methods that may reach the error of FISTA sooner; of FISTA-plus the first effort that does.

    No token is held out, so every method judges its points by the calibration error, as FISTA.
    """
    operator, calls = problem.operator, {}
    for rounds, iterations, polish in EFFORTS:
        plus = partial(_core.fista_plus, operator, xi=0.3, lambda_start=0.05, floor=None,
                       patience=3, max_rounds=rounds, iterations=iterations, polish_steps=polish,
                       threads=threads)  # fmt: skip
        calls = {f"fista-plus, {rounds} rounds of {iterations}, polish {polish}": plus}
        if plus()[1]["error"] <= goal:
            break
    calls["admm"] = partial(_core.admm, operator, damping=0.01, slow=False, threads=threads)
    calls["sparsegpt"] = partial(_core.sparsegpt, operator, damping=0.01, threads=threads)
    return calls


def check_fista(problem: Problem, results: dict[str, Any]) -> list[float]:
    points = [p if isinstance(p, torch.Tensor) else torch.from_numpy(p[0])
              for p in results.values()]  # fmt: skip
    holds = [problem.operator.pattern.holds(point.numpy(), "F32") for point in points]
    require(all(holds), "the pattern", *holds)
    errors = [problem.error(point) for point in points]
    require(max(errors[:2]) < min(errors[:2]) * 1.02, "errors of FISTA", *errors[:2])
    return errors


def bench_fista(args: argparse.Namespace, threads: int) -> None:
    table(f"FISTA to its end, all included (torch {args.torch})", "n", "m", "steps", "ours s",
          "torch s", "torch / ours", "error ours", "torch")  # fmt: skip
    sooner = []
    for n in args.sizes:
        problem = Problem.random(SHAPES[n][0], n)
        ours = partial(_core.fista, problem.operator, **FISTA, threads=threads)
        certificate = ours()[1]
        opponent = TorchFista(problem.weight, problem.gram, args.torch)
        solve = partial(opponent.solve, certificate["rounds"], FISTA)
        others = rivals(problem, problem.error(solve()), threads)
        calls = {"ours": ours, "torch": solve, **others}
        times, errors = race(args, calls, partial(check_fista, problem))
        row(n, SHAPES[n][0], certificate["iterations"], spread(times["ours"]),
            spread(times["torch"]), ratios(times["torch"], times["ours"]),
            *map("{:.5f}".format, errors[:2]))  # fmt: skip
        for name, error in zip(others, errors[2:], strict=True):
            reached = ratios(times["torch"], times[name]) if error <= errors[1] else "not reached"
            sooner.append((n, name, f"{error:.5f}", f"{errors[1]:.5f}", spread(times[name]),
                           reached))  # fmt: skip
    table("As good as FISTA in torch, sooner", "n", "method", "error", "FISTA's", "s",
          "torch / it")  # fmt: skip
    for cells in sooner:
        row(*cells)


def check_sparsegpt(problem: Problem, results: dict[str, Any]) -> list[float]:
    ours, other = torch.from_numpy(results["ours"][0]), results["torch"]
    errors = [problem.error(ours), problem.error(other)]
    require(max(errors) < min(errors) * 1.01, "errors", *errors)
    same = ((ours == 0) == (other == 0)).double().mean()
    return [*errors, float(same)]


def bench_sparsegpt(args: argparse.Namespace, threads: int) -> None:
    table("SparseGPT against the published column loop in torch", "n", "m", "pattern", "ours s",
          "torch s", "torch / ours", "error ours", "torch", "mask in common")  # fmt: skip
    for n in args.sizes:
        for pattern in ("2:4", "50%"):
            problem = Problem.random(SHAPES[n][0], n, pattern)
            ours = partial(_core.sparsegpt, problem.operator, damping=0.01, threads=threads)
            other = partial(torch_sparsegpt, problem.weight, problem.gram, pattern)
            calls: Calls = {"ours": ours, "torch": other}
            times, errors = race(args, calls, partial(check_sparsegpt, problem))
            row(n, SHAPES[n][0], pattern, spread(times["ours"]), spread(times["torch"]),
                ratios(times["torch"], times["ours"]), *map("{:.5f}".format, errors))  # fmt: skip


def bench_gram(args: argparse.Namespace, threads: int) -> None:
    table(f"Gram sums, batches of {TOKENS} tokens", "n", "ours ms", "numpy ms", "numpy / ours",
          "largest difference, of the largest entry")  # fmt: skip
    for n in args.sizes:
        x = next(batches(n, TOKENS))
        sums, total, product = _core.Statistics(n), *np.zeros((2, n, n), np.float32)

        def add(x: np.ndarray, total: np.ndarray, product: np.ndarray) -> np.ndarray:
            np.matmul(x.T, x, out=product)  # of an array and its transpose: a SYRK
            return np.add(total, product, out=total)

        def check(results: dict[str, Any], sums: _core.Statistics = sums) -> list[float]:
            expected = sums.gram()
            worst = np.abs(results["numpy"] - expected).max() / expected.max()
            require(worst < 1e-5, "sums", worst)
            return [worst]

        calls = {"ours": partial(sums.add, x, threads=threads),
                 "numpy": partial(add, x, total, product)}  # fmt: skip
        times, (worst,) = race(args, calls, check)
        row(n, spread(times["ours"], 1e-3), spread(times["numpy"], 1e-3),
            ratios(times["numpy"], times["ours"]), f"{worst:.1e}")  # fmt: skip


def bench_curve(args: argparse.Namespace) -> None:
    """Ours alone: how a step grows with n, and what the second thread is worth."""
    most, steps = max(args.threads), FISTA["iterations"]
    table(f"Cost of a FISTA step, m = {args.rows}", "n", "1 thread ms", f"{most} threads ms",
          "speed-up", "GFLOP/s of 2 m n^2, 1 thread", f"{most} threads")  # fmt: skip
    for n in args.sizes:
        problem = Problem.random(args.rows, n)
        calls = {(t, s): partial(one_round, problem, s, t) for t in (1, most) for s in (steps, 0)}
        same = partial(check_curve, (1, steps), (most, steps))
        times, _ = race(args, calls, same)
        one, many = (
            [(a - b) / steps for a, b in zip(times[t, steps], times[t, 0], strict=True)]
            for t in (1, most)
        )
        work = 2e-9 * args.rows * n * n
        rates = [spread([work / t for t in step]) for step in (one, many)]
        row(n, spread(one, 1e-3), spread(many, 1e-3), ratios(one, many), *rates)


def check_curve(one: object, many: object, results: dict[Any, Any]) -> list[float]:
    require(results[one] == results[many], "bits", results[one], results[many])
    return []


def header(args: argparse.Namespace) -> None:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    setting = os.environ.get("OPENBLAS_CORETYPE")
    print(f"""# Solver speed

Kernel {_core.kernel_name()}; torch {torch.__version__}; NumPy {np.__version__}, {blas["name"]}
{blas["version"]}; `OPENBLAS_CORETYPE` {"not set" if setting is None else f"= {setting!r}"};
{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f} at the start. Cells: min / median / max of
{args.rounds} rounds.
""")
    for n in args.sizes:
        print(f"- n = {n}, m = {SHAPES[n][0]}: {SHAPES[n][1]}")
    sys.stdout.flush()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = [n for n in SHAPES if n != 64]
    parser.add_argument("--sizes", type=int, nargs="+", choices=SHAPES, default=sizes)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch", choices=("fused", "literal"), default="fused",
                        help="which steps FISTA to its end is compared with")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="n = 64, two rounds")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.rounds = [64], 2
    args.sample = 0.0 if args.quick else SAMPLE
    args.rows = SHAPES[64][0] if args.quick else CURVE_ROWS
    return args


def child(args: argparse.Namespace) -> None:
    """All comparisons for one number of threads, which the environment names as well."""
    (threads,) = args.threads
    torch.set_num_threads(threads)
    print(f"\n## Threads: {threads}")
    for part in args.parts:
        if part != "curve":
            globals()[f"bench_{part}"](args, threads)


def main() -> None:
    args = parse()
    with torch.inference_mode():
        if args.child:
            return child(args)
        header(args)
        for threads in args.threads:
            names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
            environment = {**os.environ, **dict.fromkeys(names, str(threads))}
            words = [sys.executable, *sys.argv, "--child", "--threads", str(threads)]
            subprocess.run(words, env=environment, check=True)
        if "curve" in args.parts:
            bench_curve(args)
    print(f"\nLoad at the end: {os.getloadavg()[0]:.2f}")
    return None


if __name__ == "__main__":
    main()
