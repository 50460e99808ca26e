"""What the leading solvers and every stage around them bring, through the command line.

    python benches/python/leaders.py MODEL --calibration c4.jsonl --text wiki.test.raw --work DIR \
        --set inputs stages reference headline ratio seeds

Sets: `reference` (16 windows, first 20 test windows, as the independent prototypes), `inputs`
(which inputs and targets), `stages` (what each stage adds, first 40 test windows), `headline` (the
whole test), `ratio` (70 %, with and without a budget over layers), `seeds` (leader and rival).
"""

from __future__ import annotations

from runs import Run, parser, run_all

TUNE = ["--tune-block"]
PLAIN = ["--no-permute"]
PROTOTYPES = {"samples": 16, "windows": 20}
ABLATION = {"samples": 32, "windows": 40}
WHOLE = {"samples": 32, "windows": None}


def run(name: str, method: str, extra: list[str], pattern: str = "2:4", **size: object) -> Run:
    return {"name": name, "method": method, "pattern": pattern, "extra": extra, **size}


def reference() -> list[Run]:
    """The windows of the independent prototypes: without tuning at most 60, with it at most 50."""
    published = ["--rho-schedule", "published"]
    return [
        run("reference admm", "admm", published, **PROTOTYPES),
        run("reference best", "best", [], **PROTOTYPES),
        run("reference best, tuned", "best", TUNE, **PROTOTYPES),
    ]


def inputs() -> list[Run]:
    """Every combination of where a layer starts and what it is compared with."""
    runs = []
    for method in ("admm", "sparsegpt", "fista-plus"):
        for propagate in ("layer", "model"):
            for target in ("dense", "own"):
                words = ["--propagate", propagate, "--target", target, "--true-sequential"]
                name = f"inputs {method} {propagate} {target}"
                runs.append(run(name, method, words, **PROTOTYPES))
    for share in ("0.25", "0.5", "0.75"):
        words = ["--propagate", "model", "--target", "dense", "--correction", share]
        runs.append(run(f"inputs admm model dense {share}", "admm", words, **PROTOTYPES))
    return runs


def stages() -> list[Run]:
    """From one solver to everything, a stage at a time."""
    independent = ["--propagate", "layer", "--target", "own", "--no-true-sequential"]
    return [
        run("stage sparsegpt, layers apart", "sparsegpt", independent, **ABLATION),
        run("stage + refit", "sparsegpt", [*independent, "--refit"], **ABLATION),
        run("stage + search", "sparsegpt", [*independent, "--refit", "--search"], **ABLATION),
        run("stage best instead", "best", [*independent, *PLAIN], **ABLATION),
        run("stage + corrected inputs", "best", PLAIN, **ABLATION),
        run("stage + permutation", "best", [], **ABLATION),
        run("stage + tuning", "best", TUNE, **ABLATION),
    ]


def headline() -> list[Run]:
    """Leaders at 2:4 and at 50 % on the whole test."""
    runs = []
    for pattern in ("2:4", "50%"):
        runs += [
            run(f"admm {pattern}", "admm", [], pattern, **WHOLE),
            run(f"best {pattern}", "best", [], pattern, **WHOLE),
            run(f"best, tuned {pattern}", "best", TUNE, pattern, **WHOLE),
        ]
    return runs


def ratio() -> list[Run]:
    """70 % unstructured."""
    return [
        run("best 70%", "best", [], "70%", **ABLATION),
        run("best 70%, allocated", "best", ["--allocate"], "70%", **ABLATION),
    ]


def seeds() -> list[Run]:
    """The leader and its nearest rival on other windows."""
    return [
        run(f"{method} seed {seed}", method, ["--seed", str(seed)], **ABLATION)
        for seed in range(3)
        for method in ("best", "admm")
    ]


SETS = {f.__name__: f for f in (reference, inputs, stages, headline, ratio, seeds)}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--set", nargs="+", choices=SETS, default=list(SETS))
    args = arguments.parse_args()
    run_all([each for name in args.set for each in SETS[name]()], args)


if __name__ == "__main__":
    main()
