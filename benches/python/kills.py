"""Kills runs at random instants, lets them finish, and compares every byte.

    python benches/python/kills.py MODEL --calibration c4.jsonl --work DIR [--kills 10]

An undisturbed run first; then the same command again and again, killed (SIGKILL) `--kills` times at
instants drawn over the time of a whole run; whatever finishes is compared, and begun anew. Printed:
how often it was killed and after which layer, and the time of all parts over that of undisturbed
runs: the overhead of resuming, with the work that each kill destroyed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPORT = "rsprune-report.jsonl"
VOLATILE = {"seconds", "rss_anon", "peak_rss_anon", "import_rss_anon", "planned_peak"}
"""What two undisturbed runs do not agree in either."""


def contents(folder: Path) -> dict[str, Any]:
    """Every file; of the report what does not depend on the clock."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    lines = [json.loads(line) for line in found[REPORT].splitlines()]
    found[REPORT] = [{k: v for k, v in line.items() if k not in VOLATILE} for line in lines]
    return found


def finished_layers(partial: Path) -> int:
    report = partial / REPORT
    lines = report.read_text().splitlines() if report.exists() else []
    return sum('"kind": "layer"' in line for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()
    out, chooser = args.work / "out", random.Random(args.seed)
    partial = out.with_name("out.partial")
    args.work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "rsprune", "compress", args.model, out, "--method",
               args.method, "--samples", args.samples, "--seq-len", args.seq_len,
               "--calibration", args.calibration, "--quiet"]  # fmt: skip

    def run(seconds: float | None) -> tuple[bool, float]:
        """Whether the run was killed, and how long it took."""
        started = time.perf_counter()
        process = subprocess.Popen([str(word) for word in command])
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return True, time.perf_counter() - started
        assert code == 0, f"exit code {code}"
        return False, time.perf_counter() - started

    _, whole = run(None)
    expected = contents(out)
    shutil.rmtree(out)
    kills = finished = 0
    total, places, same = 0.0, [], True
    while kills < args.kills or finished == 0 or partial.exists():
        killed, seconds = run(chooser.uniform(0.0, whole) if kills < args.kills else None)
        total += seconds
        if killed:
            kills += 1
            places.append(finished_layers(partial))
        if out.exists():
            finished += 1
            same &= contents(out) == expected
            shutil.rmtree(out)
    print(json.dumps({
        "kills": kills,
        "finished runs": finished,
        "layers finished at each": places,
        "same bytes": same,
        "undisturbed seconds": round(whole, 1),
        "all parts over undisturbed": round(total / whole / finished, 2),
    }))  # fmt: skip
    sys.exit(not same)


if __name__ == "__main__":
    main()
