"""Perplexity against true bits: one-bit methods, and rounding to two and three bits beside them.

    python benches/python/binary.py MODEL --calibration c4.jsonl --text wiki.test.raw --work DIR

Folders are packed, so that the bits are those of files. `--windows` evaluates on the first windows
of the text; the default is the whole.
"""

from __future__ import annotations

import math
from typing import Any

from runs import Run, parser, run_all

METHODS: dict[str, list[str]] = {
    "billm": [],
    "arb": [],
    **{f"pbs2p {pattern}": ["--pattern", pattern] for pattern in ("2:8", "4:8", "5:8", "6:8")},
    **{f"pbs2p-exact {bits}": ["--bits", bits] for bits in ("1.0", "1.25", "1.5", "2.0")},
    **{f"gptq {bits}": ["--bits", bits] for bits in ("2", "3")},
}


def runs(samples: int, windows: int | None) -> list[Run]:
    """Every method once."""
    return [
        {"name": name, "method": name.split()[0], "pattern": None, "samples": samples,
         "windows": windows, "extra": [*words, "--format", "packed"]}
        for name, words in METHODS.items()
    ]  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table, true bits first."""
    heads = ("run", "true bits: linears", "whole file", "nominal", "perplexity", "layer error",
             "compress s", "peak RssAnon MiB")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for result in results:
        summary, tensors = result["summary"], result["tensors"]
        weights = [math.prod(tensor["shape"]) for tensor in tensors]

        def mean(key: str, tensors: Any = tensors, weights: Any = weights) -> float:
            pairs = zip(tensors, weights, strict=True)
            return sum(tensor[key] * weight for tensor, weight in pairs) / sum(weights)

        error = math.exp(sum(math.log(max(t["error"], 1e-12)) for t in tensors) / len(tensors))
        whole = 8 * summary["bytes_written"] / summary["parameters"]
        cells = [result["name"], f"{mean('true_bits'):.3f}", f"{whole:.3f}",
                 f"{mean('nominal_bits'):.2f}", f"{result['eval']['perplexity']:.2f}",
                 f"{error:.4f}", f"{sum(summary['seconds'].values()):.0f}",
                 f"{summary['peak_rss_anon'] / 2**20:.0f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--samples", type=int, default=32)
    arguments.add_argument("--windows", type=int)
    args = arguments.parse_args()
    run_all(runs(args.samples, args.windows), args, table=table)


if __name__ == "__main__":
    main()
