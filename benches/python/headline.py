"""Perplexity, wall time by stage and peak memory of the baselines, through the command line.

python benches/python/headline.py MODEL --calibration c4.jsonl --text wiki.test.raw --work DIR
"""

from __future__ import annotations

import argparse

from runs import Run, parser, run_all

METHODS = ("sparsegpt", "wanda", "fista", "magnitude")


def plan() -> list[Run]:
    """The runs, most telling first; `name` is the key in results.jsonl."""
    full = {"samples": 32, "windows": None}
    agreement = {"samples": 16, "windows": 20, "extra": ["--heldout", "0"]}
    runs = [{"name": f"agree-{m}-2:4", "method": m, "pattern": "2:4", **agreement}
            for m in ("sparsegpt", "wanda")]  # fmt: skip
    runs.append({"name": "dense", "method": None, **full})
    for pattern in ("2:4", "50%"):
        for method in METHODS:
            name = f"{method}-{pattern}"
            runs.append({"name": name, "method": method, "pattern": pattern, **full})
    start = ["--warm-start", "sparsegpt"]
    runs.append({"name": "fista-from-sparsegpt-2:4", "method": "fista", "pattern": "2:4",
                 "extra": start, **full})  # fmt: skip
    runs.append({"name": "sparsegpt-2:4-one-thread", "method": "sparsegpt", "pattern": "2:4",
                 "extra": ["--threads", "1"], "evaluate": False, **full})  # fmt: skip
    return runs


def main() -> None:
    args: argparse.Namespace = parser(__doc__).parse_args()
    run_all(plan(), args)


if __name__ == "__main__":
    main()
