r"""Peak memory of a run, layer after layer, and beside it that of the usual way.

    python benches/python/memory.py MODEL --calibration c4.jsonl --work DIR \
        --method wanda --memory 3GiB --samples 4 --seq-len 512 [--layers 2] [--usual]
    python benches/python/memory.py --calibration c4.jsonl --work DIR --method fista-plus MODEL \
        -- --iterations 1 --ignore '*_proj*'        # the model last, options of compress behind it

The usual way is what scripts do: `from_pretrained`, Wanda layer after layer with hooks,
`save_pretrained`. Every side is a process of its own, looked at from outside five times a second.
`--layers` ends our run after that many (it could be gone on with); the rest is projected.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def watch(command: list[str], done: Any = None) -> dict[str, Any]:
    """Runs a process; returns its seconds and the peaks of its memory, in MiB."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    status, peaks = Path(f"/proc/{process.pid}/status"), {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}
    while process.poll() is None:
        for line in status.read_text().splitlines():
            key, _, value = line.partition(":")
            if key in peaks:
                peaks[key] = max(peaks[key], int(value.split()[0]))
        if done is not None and done():
            process.send_signal(signal.SIGTERM)
            done = None
        time.sleep(0.2)
    if process.returncode not in (0, 143):
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    seconds = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, **{key: value // 1024 for key, value in peaks.items()}}


def ours(args: argparse.Namespace) -> None:
    out = args.work / "ours"
    partial = out.with_name("ours.partial")
    for path in (out, partial):
        shutil.rmtree(path, ignore_errors=True)
    command = [sys.executable, "-m", "rsprune", "compress", args.model, out, "--pattern", "2:4",
               "--method", args.method, "--memory", args.memory, "--samples", args.samples,
               "--seq-len", args.seq_len, "--calibration", args.calibration, *args.options,
               "--json"]  # fmt: skip

    def layers() -> list[dict[str, Any]]:
        reports = [f / "rsprune-report.jsonl" for f in (out, partial)]
        lines = [x for r in reports if r.exists() for x in r.read_text().splitlines(keepends=True)]
        records = [json.loads(x) for x in lines if x.endswith("\n")]
        return [record for record in records if record["kind"] == "layer"]

    enough = (lambda: len(layers()) >= args.layers) if args.layers else None
    found = watch([str(word) for word in command], enough)
    done = layers()
    total = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    mean = sum(layer["seconds"] for layer in done) / len(done)
    print(json.dumps({
        "side": f"rsprune {args.method}",
        "memory": args.memory,
        "layers": f"{len(done)} of {total}",
        **found,
        "seconds a layer": round(mean, 1),
        "projected hours": round(mean * total / 3600, 2),
        "RssAnon after each layer": [layer["rss_anon"] >> 20 for layer in done],
    }))  # fmt: skip


def usual(args: argparse.Namespace) -> None:
    out = args.work / "usual"
    shutil.rmtree(out, ignore_errors=True)
    words = [args.model, out, args.samples, args.seq_len]
    found = watch([sys.executable, __file__, "--the-usual-way", *map(str, words)])
    print(json.dumps({"side": "usual wanda", **found}))
    shutil.rmtree(out)


def the_usual_way(model: str, out: str, samples: int, seq_len: int) -> None:
    """Wanda as scripts do it: the whole model in memory, one layer's inputs at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    layers = network.model.layers
    ids = torch.randint(0, 256, (samples, seq_len), generator=torch.Generator().manual_seed(0))
    caught: list[tuple[Any, dict[str, Any]]] = []

    class StopError(Exception):
        pass

    def catch(module: Any, given: Any, named: dict[str, Any]) -> None:
        caught.append((given[0], named))
        raise StopError

    with torch.no_grad():
        handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        for window in ids:
            with contextlib.suppress(StopError):
                network(window[None])
        handle.remove()
        hidden = [given for given, _ in caught]
        for layer in layers:
            linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
            norms = {n: torch.zeros(m.in_features) for n, m in linears.items()}

            def add(_: Any, given: Any, total: Any) -> None:
                total += given[0].float().square().sum((0, 1))

            hooks = [
                linear.register_forward_pre_hook(functools.partial(add, total=norms[name]))
                for name, linear in linears.items()
            ]
            for x, (_, named) in zip(hidden, caught, strict=True):
                layer(x, **named)
            for hook in hooks:
                hook.remove()
            for name, linear in linears.items():
                score = linear.weight.float().abs() * norms[name].sqrt()
                worst = score.reshape(-1, 4).topk(2, largest=False).indices
                linear.weight.view(-1, 4).scatter_(1, worst, 0.0)
            hidden = [layer(x, **named) for x, (_, named) in zip(hidden, caught, strict=True)]
    network.save_pretrained(out)


def main() -> None:
    if sys.argv[1:2] == ["--the-usual-way"]:
        model, out, samples, seq_len = sys.argv[2:]
        the_usual_way(model, out, int(samples), int(seq_len))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--usual", action="store_true")
    parser.add_argument("options", nargs="*", help="further options of compress, after --")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    ours(args)
    if args.usual:
        usual(args)


if __name__ == "__main__":
    main()
