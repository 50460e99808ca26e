"""Perplexity, wall time by stage and peak memory of every method, through the command line.

    python benches/python/headline.py MODEL --calibration c4.jsonl --text wiki.test.raw --work DIR

Every run is a process of its own. Finished runs stand in DIR/results.jsonl and are not repeated,
so the bench can be stopped and started again; `--table` prints what is there as Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

METHODS = ("sparsegpt", "wanda", "fista", "magnitude")


def plan(args: argparse.Namespace) -> list[dict]:
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
    return [run for run in runs if not args.only or run["name"] in args.only]


def command(*words: object) -> dict:
    """Runs `rsprune WORDS --json` and returns its result line."""
    done = subprocess.run(
        [sys.executable, "-m", "rsprune", *map(str, words), "--json"],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measure(run: dict, args: argparse.Namespace) -> dict:
    """Compresses (unless dense) and evaluates; returns the record of the run."""
    record = {"name": run["name"], "samples": run["samples"]}
    model = args.model
    threads = ["--threads", args.threads] if args.threads else []
    if run["method"]:
        model = args.work / run["name"].replace(":", "of")
        words = ["--method", run["method"], "--pattern", run["pattern"], "--samples",
                 run["samples"], "--calibration", args.calibration, "--overwrite"]  # fmt: skip
        command("compress", args.model, model, *words, *threads, *run.get("extra", []))
        lines = (model / "rsprune-report.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        record["summary"] = records[-1]
        record["layer_rss_anon"] = [r["rss_anon"] for r in records if r["kind"] == "layer"]
        record["tensors"] = [r for r in records if r["kind"] == "tensor"]
    if run.get("evaluate", True):
        some = ["--windows", run["windows"]] if run["windows"] else []
        record["eval"] = command("eval", model, "--text", args.text, *threads, *some)
    if run["method"]:
        shutil.rmtree(model)
    return record


def table(results: list[dict]) -> str:
    """The results as a Markdown table."""
    heads = ("run", "perplexity", "windows", "compress s (calibrate, solve, propagate)",
             "peak RssAnon MiB (above start)", "eval s")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for result in results:
        evaluation, summary = result.get("eval", {}), result.get("summary")
        cells = [result["name"], f"{evaluation.get('perplexity', float('nan')):.3f}",
                 str(evaluation.get("windows", "-"))]  # fmt: skip
        if summary:
            seconds = summary["seconds"]
            stages = ("calibrate", "solve", "propagate")
            parts = ", ".join(f"{seconds.get(stage, 0):.0f}" for stage in stages)
            peak, start = summary["peak_rss_anon"], summary["import_rss_anon"]
            cells += [f"{sum(seconds.values()):.0f} ({parts})",
                      f"{peak / 2**20:.0f} ({(peak - start) / 2**20:.0f})"]  # fmt: skip
        else:
            cells += ["-", "-"]
        cells.append(f"{evaluation.get('seconds', float('nan')):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="names of runs; the default is all")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    log = args.work / "results.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not args.table:
        for run in plan(args):
            if run["name"] not in {result["name"] for result in done}:
                done.append(measure(run, args))
                with log.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
                print(table(done[-1:]).splitlines()[-1], flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
