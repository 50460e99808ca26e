"""The model card of a model that has lost decoder layers."""

from __future__ import annotations

from typing import Any

from rsprune.card import front_matter, load_section, recipe_section, shown_name, title
from rsprune.report import Report

CLOSING = "It has fewer decoder layers, so its files are smaller and it runs faster."


def depth_card(report: Report, source_card: str | None, base_model: str) -> str:
    """README.md with YAML front matter.

    Args:
        report: of the finished run.
        source_card: text of the base model's README.md, from which the licence is taken.
        base_model: hub id or path that the user named.
    """
    config = report.run.get("config") or {}
    shown = shown_name(base_model)
    tags = ["depth pruning", config.get("method")]
    count = report.run.get("removed")
    parts = [
        front_matter(tags, source_card, base_model),
        f"# {title(shown)}, {count} decoder layers removed\n",
        _what_was_done(report, config, shown),
        load_section(CLOSING),
        _removals(report),
        _texts(report),
        recipe_section(report, shown),
    ]
    return "\n".join(parts)


def _what_was_done(report: Report, config: dict[str, Any], base_model: str) -> str:
    run = report.run
    layers, removed = run.get("layers"), [record["removed"] for record in report.removals]
    names = ", ".join(map(str, sorted(removed)))
    return (
        f"`{base_model}` ({run.get('architecture')}, {layers} decoder layers), from which rsprune "
        f"{run.get('version')} removed {len(removed)} by the method `{config.get('method')}`: "
        f"{names} (counted from 0). {_folded(report)} There was no training afterwards.\n"
    )


def _folded(report: Report) -> str:
    folded = [r["layer"] for r in report.layers if "after" in (r.get("fold") or {})]
    if not folded:
        return "All other weights are as in the base model."
    return (
        "A least-squares map in place of the removed layers was folded into the last linear of "
        f"layers {', '.join(map(str, folded))} (new numbers); all other weights are as in the "
        "base model."
    )


def _removals(report: Report) -> str:
    lines = [
        "## Removed layers",
        "",
        "In this order; the score is what the layer had when it went. All scores are in",
        "`rsprune-report.jsonl`, and drawn in `rsprune-scores.html`.",
        "",
        "| iteration | layer | score |",
        "|---|---|---|",
    ]
    for record in report.removals:
        score = record["scores"].get(str(record["removed"]))
        lines.append(f"| {record['iteration'] + 1} | {record['removed']} | {score:.6g} |")
    return "\n".join([*lines, ""])


def _texts(report: Report) -> str:
    facts = report.run.get("texts") or {}
    text = (
        f"## Calibration\n\n{facts.get('texts')} texts of {facts.get('tokens')} tokens of "
        f"`{facts.get('source')}`."
    )
    return f"{text} Note: {facts['note']}.\n" if facts.get("note") else f"{text}\n"
