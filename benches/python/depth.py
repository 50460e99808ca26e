"""Depth pruning of a real model: which layers to remove, and what it costs.

    python benches/python/depth.py MODEL --calibration c4.jsonl --text wiki.test.raw --work DIR \
        --set table seeds speed

Sets: `table` (every method at 10, 20 and 30 %), `seeds` (the leaders and their rivals at 20 %,
three seeds), `speed` (the streamed backward pass against one in memory). Runs go through the
command line, are kept in DIR/results.jsonl and not repeated; what every pruned model writes on to a
prompt is kept with them.

A method's order of removals for 30 % begins with those for 20 % and for 10 %, so layers are scored
once for 30 %, and the smaller shares and folds are runs of the method `given`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from runs import command, parser, run_all

Run = dict[str, Any]
PROMPT = "The first thing that a visitor to the old town sees is"
KINDS: dict[str, list[str]] = {
    "random": ["--method", "random"],
    "bi": ["--method", "bi"],
    "taylor": ["--method", "taylor"],
    "perplexity": ["--method", "perplexity"],
    "perplexity-greedy": ["--method", "perplexity-greedy"],
    "pip l1": ["--method", "pip", "--pip-norm", "l1"],
    "pip l2": ["--method", "pip", "--pip-norm", "l2"],
    "pip taylor": ["--method", "pip"],
    "pip taylor, unprotected": ["--method", "pip", "--protect", "0,0"],
}
FOLDED = ("bi", "pip taylor")
RIVALS = ("random", "bi", "perplexity", "pip taylor")
SHARES = ("10%", "20%", "30%")


def scored(kind: str, seed: int, share: str) -> Run:
    """Scores layers and removes them."""
    words = [*KINDS[kind], "--remove", share, "--no-fold", "--seed", str(seed)]
    return {"name": f"{kind} {share} seed {seed}", "words": words}


def again(kind: str, seed: int, of: str, share: str, fold: bool) -> Run:
    """The first of the layers that `scored(kind, seed, of)` removed."""
    name = f"{kind} + fold {share} seed {seed}" if fold else f"{kind} {share} seed {seed}"
    words = ["--method", "given", "--fold" if fold else "--no-fold", "--seed", str(seed)]
    part = float(share[:-1]) / float(of[:-1])
    return {"name": name, "words": words, "order": f"{kind} {of} seed {seed}", "part": part}


def table() -> list[Run]:
    """Every method at three shares."""
    runs = [scored(kind, 0, "30%") for kind in KINDS]
    runs += [again(kind, 0, "30%", share, False) for kind in KINDS for share in ("10%", "20%")]
    return runs + [again(kind, 0, "30%", share, True) for kind in FOLDED for share in SHARES]


def seeds() -> list[Run]:
    """Other texts; seed 0 is in the table."""
    runs = [scored(kind, seed, "20%") for seed in (1, 2) for kind in RIVALS]
    return runs + [again(k, seed, "20%", "20%", True) for seed in (1, 2) for k in FOLDED]


def measure(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Removes layers, evaluates, and lets the result write on."""
    out = args.work / run["name"].replace(" ", "-").replace("%", "")
    threads = ["--threads", args.threads] if args.threads else []
    given = ["--remove", removals(run, args.work)] if "order" in run else []
    words = [*run["words"], *given, "--samples", args.samples, "--calibration", args.calibration]
    compressed = command("compress", args.model, out, "--overwrite", *words, *threads)
    lines = (out / "rsprune-report.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    some = ["--windows", args.windows] if args.windows else []
    record = {
        "name": run["name"],
        "summary": compressed["summary"],
        "removed": [r["removed"] for r in records if r["kind"] == "removal"],
        "removal_rss_anon": [r["rss_anon"] for r in records if r["kind"] == "removal"],
        "folds": [r["fold"] for r in records if "fold" in r],
        "stored_bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
        "eval": command("eval", out, "--text", args.text, *threads, *some),
        "sample": sample(out),
    }
    shutil.rmtree(out)
    return record


def removals(run: Run, work: Path) -> str:
    """The first layers that an earlier run removed, as `given` takes them."""
    results = [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]
    (order,) = [result["removed"] for result in results if result["name"] == run["order"]]
    return ",".join(map(str, order[: round(run["part"] * len(order))]))


def sample(folder: Path) -> str:
    """What the model makes of a prompt, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=40, do_sample=False)
    text: str = tokenizer.decode(written[0], skip_special_tokens=True)
    return text


def rows(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    heads = ("run", "removed, in order", "perplexity", "stored MB", "score s", "fold s",
             "peak RssAnon MiB (above start)")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for result in results:
        summary = result["summary"]
        seconds, peak = summary["seconds"], summary["peak_rss_anon"]
        above = peak - summary["import_rss_anon"]
        cells = [result["name"], " ".join(map(str, result["removed"])),
                 f"{result['eval']['perplexity']:.2f}", f"{result['stored_bytes'] / 1e6:.1f}",
                 f"{seconds.get('score', 0):.0f}", f"{seconds.get('fold', 0):.0f}",
                 f"{peak / 2**20:.0f} ({above / 2**20:.0f})"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed(args: argparse.Namespace, repeats: int = 3) -> None:
    """Forward and backward of the same windows, streamed and with the whole model in memory.

    Both give the gradients' sizes of every layer; the model in memory makes every weight gradient.
    They take turns in one process and agree before a time counts.
    """
    import torch

    from rsprune.config import Config
    from rsprune.depth.plan import Opened
    from rsprune.depth.scores import Scoring, gradient_scores
    from rsprune.depth.views import choose_texts
    from rsprune.depth.walk import Walk
    from rsprune.mixture import load_corpora
    from rsprune.skeleton import load_tokenizer

    threads = args.threads or 1
    torch.set_num_threads(threads)
    config = Config.create(method="pip", remove="1", calibration=str(args.calibration), texts=4)
    tokenizer = load_tokenizer(args.model)
    texts = choose_texts(load_corpora(config.calibration), tokenizer, count=config.texts,
                         tokens=config.text_tokens, seed=0)  # fmt: skip
    opened = Opened.of(args.model, config, config.text_tokens)
    times: dict[str, list[float]] = {"streamed": [], "in memory": []}
    with tempfile.TemporaryDirectory() as scratch, Walk(opened.stream, threads, Path(scratch)) as w:
        scoring = Scoring(w, texts, tokenizer, config)
        kept = list(range(len(opened.skeleton.layers)))
        whole = _Whole(args.model)
        for _ in range(repeats):
            begun = time.perf_counter()
            found = gradient_scores(scoring, kept, 0, ("pip-taylor",))["pip-taylor"]
            times["streamed"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            expected = whole.scores(texts.plain, scoring.edited(0))
            times["in memory"].append(time.perf_counter() - begun)
            for index, score in enumerate(expected):
                assert abs(found[index] - score) <= 1e-2 * score, (index, found[index], score)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name}: {medians[name]:.2f} s ({min(values):.2f} to {max(values):.2f})")
    print(f"streamed / in memory: {medians['streamed'] / medians['in memory']:.2f}")


class _Whole:
    """The usual way: the model in float32 with all its gradients."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def scores(self, plain: Any, edited: Any) -> list[float]:
        """PertImport in the taylor norm of every layer."""
        import torch

        layers = self.model.get_decoder().layers
        totals = [0.0] * len(layers)
        for views in zip(plain, edited, strict=True):
            self.model.zero_grad(set_to_none=True)
            for sign, ids in zip((-1.0, 1.0), views, strict=True):
                logits = self.model(ids[None, :-1], use_cache=False).logits[0]
                (sign * torch.nn.functional.cross_entropy(logits, ids[1:])).backward()
            for index, layer in enumerate(layers):
                parts = (float((p.detach() * p.grad).abs().sum()) for p in layer.parameters())
                totals[index] += sum(parts) / len(plain)
        return totals


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--set", nargs="+", choices=("table", "seeds", "speed"),
                           default=["table", "seeds", "speed"])  # fmt: skip
    arguments.add_argument("--samples", type=int, default=32, help="windows to fit maps to")
    arguments.add_argument("--windows", type=int, help="of the test text; the default is all")
    args = arguments.parse_args()
    runs = [run for make in (table, seeds) if make.__name__ in args.set for run in make()]
    run_all(runs, args, measure, rows)
    if "speed" in args.set and not args.table:
        speed(args)


if __name__ == "__main__":
    main()
