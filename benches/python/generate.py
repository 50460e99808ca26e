"""End to end: tokens a second and resident memory of a dense model and of its packed forms.

    python benches/python/generate.py MODEL --work DIR
    python benches/python/generate.py MODEL --work DIR --threads 2 \
        --packed "2:4=--method magnitude --pattern 2:4 --samples 8" \
        --packed "1 bit=--method pbs2p-exact --bits 1 --calibration c4.jsonl --samples 8"

Packed folders are made by `rsprune compress ... --format packed` where they are not there yet.
Every measurement is a process of its own: it loads the model in bfloat16, generates greedily from a
prompt and prints its tokens a second (after a first run that is not timed) and its resident memory,
which beside the model holds Python, torch and transformers (row "nothing"). Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

PROMPT = "The history of the city begins with"
PACKED = ["2:4=--method magnitude --pattern 2:4 --samples 8"]


def pack(model: Path, options: str, out: Path) -> None:
    """Makes a packed folder, unless it is there."""
    if not out.exists():
        command = [sys.executable, "-m", "rsprune", "compress", str(model), str(out)]
        subprocess.run([*command, "--format", "packed", *shlex.split(options)], check=True)


def resident() -> dict[str, float]:
    """MiB of this process."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("RssAnon", "RssFile", "VmRSS"):
            found[key] = int(value.split()[0]) / 1024
    return found


def measure(folder: str, mode: str, threads: int, tokens: int) -> dict[str, Any]:
    """What a child process does; `folder` is empty for the imports alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import rsprune

    torch.set_num_threads(threads)
    if not folder:
        return resident()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    if mode:
        rsprune.set_compute(model, mode)
    prompt = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    length = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
    with torch.inference_mode():
        model.generate(**prompt, **{**length, "min_new_tokens": 2, "max_new_tokens": 2})
        start = time.perf_counter()
        generated = model.generate(**prompt, **length)
        seconds = time.perf_counter() - start
    made = generated.shape[1] - prompt["input_ids"].shape[1]
    assert made == tokens, f"expected {tokens} tokens, found {made}"
    return {"tokens/s": tokens / seconds, **resident()}


def child(folder: Path | str, mode: str, args: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, str(args.model), "--child", str(folder), "--mode", mode,
               "--threads", str(args.threads), "--tokens", str(args.tokens)]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def cell(values: list[float]) -> str:
    return f"{min(values):.1f} / {median(values):.1f} / {max(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("."))
    parser.add_argument("--packed", action="append", metavar="NAME=OPTIONS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--mode", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(measure(args.child, args.mode, args.threads, args.tokens)))
        return
    sides: list[tuple[str, Path | str, str]] = [("nothing", "", ""), ("dense", args.model, "")]
    for text in args.packed or PACKED:
        name, _, options = text.partition("=")
        folder = args.work / f"generate-{name.replace(':', '-').replace(' ', '-')}"
        pack(args.model, options, folder)
        forms = json.loads((folder / "config.json").read_text())["quantization_config"]["linears"]
        is_signs = all(form.startswith("signs") for form in forms.values())
        modes = ("float32", "int8") if is_signs else ("float32",)
        sides += [(f"{name} {mode}", folder, mode) for mode in modes]
    found: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in sides}
    for _ in range(args.rounds):
        for name, folder, mode in sides:
            found[name].append(child(folder, mode, args))
    keys = ("tokens/s", "RssAnon", "RssFile", "VmRSS")
    print("| model |", " | ".join(keys), "|\n|---|" + "---|" * len(keys))
    for name, rounds in found.items():
        cells = [cell([each[key] for each in rounds]) if key in rounds[0] else "" for key in keys]
        print("|", " | ".join([name, *cells]), "|")


if __name__ == "__main__":
    main()
