"""What stands in for removed layers: deletion, the published replacement, and ours.

    python benches/python/flexigpt.py MODEL --calibration c4.jsonl --text wiki.test.raw --work DIR \
        --set main options

Sets: `main` (deletion, faithful and untrained, default, default with recovery; 10, 20 and 30 %),
`options` (every option alone at 20 %), `seeds` (default and deletion, three seeds of calibration).
Stored bytes are those of the whole output; what a stand-in takes of them is in
results.jsonl (`blocks`).
"""

from __future__ import annotations

from runs import Run, parser, run_all

SHARES = ("10%", "20%", "30%")
OPTIONS = ("fold", "map", "shared", "own", "svd")
DEFAULT: list[str] = []
FAITHFUL = ["--flexigpt-mode", "faithful"]
RECOVERED = ["--recover"]


def run(name: str, share: str, extra: list[str], method: str = "flexigpt") -> Run:
    words = ["--remove", share, *extra]
    return {"name": f"{name} {share}", "method": method, "pattern": None, "extra": words}


def main_runs() -> list[Run]:
    """The rows of the table."""
    runs: list[Run] = [{"name": "dense", "method": None}]
    for share in SHARES:
        runs += [
            run("deletion", share, ["--no-fold"], method="bi"),
            run("faithful, untrained", share, FAITHFUL),
            run("default", share, DEFAULT),
            run("default + recovery", share, RECOVERED),
        ]
    return runs


def options() -> list[Run]:
    """Every option alone."""
    return [run(f"only {name}", "20%", ["--replace", name]) for name in OPTIONS]


def seeds() -> list[Run]:
    """Other calibration windows."""
    runs = []
    for seed in range(3):
        words = ["--seed", str(seed)]
        runs += [
            run(f"deletion seed {seed}", "20%", ["--no-fold", *words], method="bi"),
            run(f"default seed {seed}", "20%", words),
        ]
    return runs


SETS = {"main": main_runs, "options": options, "seeds": seeds}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--set", nargs="+", choices=SETS, default=["main"])
    arguments.add_argument("--samples", type=int, default=32)
    arguments.add_argument("--windows", type=int, help="of the test text; the default is all")
    args = arguments.parse_args()
    common = {"samples": args.samples, "windows": args.windows}
    run_all([{**each, **common} for name in args.set for each in SETS[name]()], args)


if __name__ == "__main__":
    main()
