"""Runs of the command line whose results are kept: what the quality benches share.

Every run is a process of its own. Finished runs stand in DIR/results.jsonl and are not repeated,
so a bench can be stopped and started again; `--table` prints what is there as Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = dict[str, Any]
"""name; method (None: the dense model), pattern (None: a method without one), samples, windows
(None: the whole text), extra."""


def command(*words: object) -> dict[str, Any]:
    """Runs `rsprune WORDS --json` and returns its result line."""
    done = subprocess.run(
        [sys.executable, "-m", "rsprune", *map(str, words), "--json"],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Compresses (unless dense) and evaluates; returns the record of the run."""
    record: dict[str, Any] = {"name": run["name"], "samples": run["samples"]}
    model = args.model
    threads = ["--threads", args.threads] if args.threads else []
    if run["method"]:
        model = args.work / run["name"].replace(":", "of")
        words = ["--method", run["method"], "--samples", run["samples"], "--calibration",
                 args.calibration, "--overwrite"]  # fmt: skip
        words += ["--pattern", run["pattern"]] if run["pattern"] else []
        command("compress", args.model, model, *words, *threads, *run.get("extra", []))
        lines = (model / "rsprune-report.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        record["summary"] = records[-1]
        layers = [r for r in records if r["kind"] == "layer"]
        record["layer_rss_anon"] = [layer["rss_anon"] for layer in layers]
        record["tuning"] = [layer["tuning"] for layer in layers if "tuning" in layer]
        record["tensors"] = [r for r in records if r["kind"] == "tensor"]
        record["blocks"] = [block for layer in layers for block in layer.get("blocks", ())]
    if run.get("evaluate", True):
        some = ["--windows", run["windows"]] if run["windows"] else []
        record["eval"] = command("eval", model, "--text", args.text, *threads, *some)
    if run["method"]:
        shutil.rmtree(model)
    return record


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    heads = ("run", "perplexity", "windows", "stored MiB", "compress s (by stage)",
             "peak RssAnon MiB (above start)", "eval s")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for result in results:
        evaluation, summary = result.get("eval", {}), result.get("summary")
        cells = [result["name"], f"{evaluation.get('perplexity', float('nan')):.3f}",
                 str(evaluation.get("windows", "-"))]  # fmt: skip
        if summary:
            seconds = {name: value for name, value in summary["seconds"].items() if value >= 1}
            parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
            peak, start = summary["peak_rss_anon"], summary["import_rss_anon"]
            cells += [f"{summary['bytes_written'] / 2**20:.1f}",
                      f"{sum(summary['seconds'].values()):.0f} ({parts})",
                      f"{peak / 2**20:.0f} ({(peak - start) / 2**20:.0f})"]  # fmt: skip
        else:
            cells += ["-", "-", "-"]
        cells.append(f"{evaluation.get('seconds', float('nan')):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all of these benches take."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("model", type=Path)
    made.add_argument("--calibration", type=Path, required=True)
    made.add_argument("--text", type=Path, required=True)
    made.add_argument("--work", type=Path, required=True)
    made.add_argument("--only", nargs="*", help="names of runs; the default is all")
    made.add_argument("--threads", type=int)
    made.add_argument("--table", action="store_true")
    return made


def run_all(
    runs: list[Run],
    args: argparse.Namespace,
    measure: Callable[[Run, argparse.Namespace], dict[str, Any]] = measure,
    table: Callable[[list[dict[str, Any]]], str] = table,
) -> None:
    """Measures what is not measured yet, and prints the table."""
    args.work.mkdir(parents=True, exist_ok=True)
    log = args.work / "results.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    chosen = [run for run in runs if not args.only or run["name"] in args.only]
    for run in () if args.table else chosen:
        if run["name"] not in {result["name"] for result in done}:
            done.append(measure(run, args))
            with log.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            print(table(done[-1:]).splitlines()[-1], flush=True)
    names = [run["name"] for run in chosen]
    print(table([result for result in done if result["name"] in names]))
