"""The model card (README.md) of an output folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from rsprune.methods import CODED
from rsprune.report import Report, by_kind

__all__ = [
    "LICENCE_KEYS",
    "front_matter",
    "load_section",
    "model_card",
    "read_front_matter",
    "recipe_section",
    "shown_name",
    "title",
]

LICENCE_KEYS = ("license", "license_name", "license_link")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

NEEDED = """> **`import rsprune` first.** The pruned linears are packed; without that import
> transformers fills them with random numbers and only warns. `pip install rsprune`
"""

LOAD_PACKED = """## How to load it

```python
import rsprune  # or the packed linears are initialised at random
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this folder>", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
```

`rsprune.load("<this folder>", dequantize=True)` gives an ordinary model and
`rsprune export <this folder> OUT --dense` an ordinary checkpoint, both with exactly the weights
that are packed here.
"""

LOAD = """## How to load it

It is an ordinary checkpoint. rsprune is not needed:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this folder>", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
```
"""

DENSE = """The weights are stored dense, zeros included: the files are as large as before, and
ordinary kernels take as long as before. The zeros are there for software that makes use of them."""


def model_card(report: Report, *, source_card: str | None, base_model: str) -> str:
    """README.md with YAML front matter.

    Args:
        report: of the finished run.
        source_card: text of the base model's README.md, from which the licence is taken.
        base_model: hub id or path that the user named.
    """
    config = report.run.get("config") or {}
    shown, packed = shown_name(base_model), report.packed
    coded = config.get("method") in CODED
    tags = [
        "quantized" if coded else "pruned",
        "packed" if packed else None,
        None if coded else config.get("pattern"),
        config.get("method"),
    ]
    parts = [
        front_matter(tags, source_card, base_model),
        *([NEEDED] if packed else []),
        f"# {title(shown)}, {_target(report, config)}\n",
        _what_was_done(report, config, shown),
        LOAD_PACKED if packed else load_section(DENSE),
        _certificate(report),
        _calibration(report),
        recipe_section(report, shown),
    ]
    return "\n".join(parts)


def _target(report: Report, config: dict[str, Any]) -> str:
    if (bits := report.packed_bits) is not None:
        where = "where it is packed" if report.packed else "if it were packed"
        return f"{bits:.2f} bits a weight {where}"
    return f"pruned to {config.get('pattern')}"


def shown_name(base_model: str) -> str:
    """A card is published: it names a local model, but not where it lay on somebody's disk."""
    return base_model if HUB_ID.fullmatch(base_model) else title(base_model)


def load_section(remark: str) -> str:
    """How to load an ordinary folder, and a remark on it."""
    return f"{LOAD}\n{remark}\n"


def front_matter(tags: Sequence[str | None], source_card: str | None, base: str) -> str:
    """The YAML that the hub reads: library, base model, licence, tags (`rsprune` among them).

    Args:
        tags: None for one that is not known.
        source_card: text of the base model's card.
        base: hub id or path that the user named.
    """
    front: dict[str, Any] = {"library_name": "transformers"}
    if HUB_ID.fullmatch(base):
        front["base_model"] = base  # the hub refuses a card whose base_model is a local path
    source = read_front_matter(source_card or "")
    front |= {key: source[key] for key in LICENCE_KEYS if key in source}
    first, *others = tags
    front["tags"] = [str(tag) for tag in (first, "rsprune", *others) if tag]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"


def read_front_matter(card: str) -> dict[str, Any]:
    """The YAML between the first two `---` lines; empty if there is none or it is broken."""
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    if match is None:
        return {}
    try:
        content = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # the others: of dates, of depth
        return {}  # the base model's card is not ours to refuse
    return content if isinstance(content, dict) else {}


def title(base_model: str) -> str:
    """The last part of a hub id or path."""
    return base_model.rstrip("/").rpartition("/")[2] or base_model


def _what_was_done(report: Report, config: dict[str, Any], base_model: str) -> str:
    run, summary = report.run, report.summary or {}
    if report.packed_bits is not None:
        return (
            f"`{base_model}` ({run.get('architecture')}, {run.get('layers')} decoder layers), "
            f"coded by rsprune {run.get('version')} with the method `{config.get('method')}`. "
            f"Bits per weight: {report.bits}. {_if_packed(report)}{_what_else(config)}\n"
        )
    weights, zeros = summary.get("weights") or 0, summary.get("zeros") or 0
    share = f", {zeros / weights:.1%} of these weights are zero" if weights else ""
    return (
        f"`{base_model}` ({run.get('architecture')}, {run.get('layers')} decoder layers), pruned "
        f"by rsprune {run.get('version')} with the method `{config.get('method')}` to the pattern "
        f"`{config.get('pattern')}`: {len(report.tensors)} tensors were pruned{share}. "
        f"{f'Bits per weight: {report.bits}. ' if report.bits else ''}"
        f"{_what_else(config)}\n"
    )


def _if_packed(report: Report) -> str:
    """What a folder would take that stores its codes as ordinary weights."""
    if report.packed:
        return ""
    return (
        f"They are stored as ordinary weights; packed, {len(report.tensors)} tensors would take "
        f"{report.packed_bits:.3f} bits a weight, everything counted. "
    )


def _what_else(config: dict[str, Any]) -> str:
    if config.get("tune_block"):
        return (
            "The kept weights and the norms of every decoder layer were then fitted to the dense "
            "layer's output on the calibration windows; the errors below are from before that."
        )
    return "Everything else is as in the base model. There was no training afterwards."


def _certificate(report: Report) -> str:
    lines = [
        "## Certificate",
        "",
        "True bits are those stored of a weight, everything counted that a packed form needs.",
        "Relative error of each operator's output on the calibration windows and on held-out ones",
        "that no solver saw: geometric mean over the layers. Each tensor's own line is in",
        "`rsprune-report.jsonl`; `rsprune verify` checks this folder against it.",
        "",
        "| operator | tensors | true bits | error | held-out error | zeros |",
        "|---|---|---|---|---|---|",
    ]
    for row in by_kind(report.tensors):
        errors = f"{_number(row.error)} | {_number(row.heldout_error)}"
        bits = "-" if row.true_bits is None else f"{row.true_bits:.3f}"
        lines.append(f"| `{row.kind}` | {row.count} | {bits} | {errors} | {row.sparsity:.1%} |")
    few = [f"\n{report.few_tokens}."] if report.few_tokens else []
    return "\n".join([*lines, *few, ""])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _calibration(report: Report) -> str:
    facts = report.run.get("calibration") or {}
    source = facts.get("source") or "the offline default"
    text = (
        f"## Calibration\n\n{facts.get('samples')} windows of {facts.get('seq_len')} tokens of "
        f"`{source}`, {facts.get('heldout')} of them held out."
    )
    return f"{text} Note: {facts['note']}.\n" if facts.get("note") else f"{text}\n"


def recipe_section(report: Report, base_model: str) -> str:
    """How to make the folder again: versions, command and recipe."""
    versions = report.run.get("versions") or {}
    named = [f"rsprune {report.run.get('version')}"]
    named += [f"{name} {version}" for name, version in sorted(versions.items())]
    named += [f"kernel {report.run.get('kernel')}"]
    recipe = yaml.safe_dump(report.run.get("config") or {}, sort_keys=False)
    return (
        "## How to reproduce it\n\n"
        f"With `recipe.yaml` of this folder ({', '.join(named)}):\n\n"
        f"```\nrsprune compress {base_model} OUT --recipe recipe.yaml\n```\n\n"
        f"The recipe:\n\n```yaml\n{recipe}```\n"
    )
