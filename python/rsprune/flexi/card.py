"""The model card of a model whose removed layers have stand-ins."""

from __future__ import annotations

from typing import Any

from rsprune.card import front_matter, load_section, recipe_section, shown_name, title
from rsprune.report import Report

NEEDED = (
    "> Needs `import rsprune` before it is loaded: without it, transformers initialises the layers "
    "that share weights at random, and only says so in a report.\n"
)


def flexi_card(report: Report, source_card: str | None, base_model: str) -> str:
    """README.md with YAML front matter; arguments as of the other cards."""
    config = report.run.get("config") or {}
    shown = shown_name(base_model)
    needs = needs_rsprune(report)
    what = f"{config.get('extend')} layers repeated" if config.get("extend") else (
        f"{report.run.get('removed')} decoder layers replaced"
    )  # fmt: skip
    parts = [
        front_matter(["depth pruning", "flexigpt"], source_card, base_model),
        *([NEEDED] if needs else []),
        f"# {title(shown)}, {what}\n",
        load_section("Say `import rsprune` first." if needs else "It is an ordinary checkpoint."),
        _stand_ins(report),
        recipe_section(report, shown),
    ]
    return "\n".join(parts)


def needs_rsprune(report: Report) -> bool:
    """Whether a layer is no ordinary one."""
    positions = (p for layer in report.layers for p in layer.get("positions", ()))
    return any(position.get("block") for position in positions)


def stand_ins(report: Report) -> list[dict[str, Any]]:
    """What is said of every removed layer, in order."""
    return [block for layer in report.layers for block in layer.get("blocks", ())]


def _stand_ins(report: Report) -> str:
    rows = stand_ins(report)
    if not rows:
        return "Its repetitions add nothing yet: it computes what the base model does.\n"
    lines = [
        "## What stands in for the removed layers",
        "",
        "Errors are relative to the dense layer's output, on calibration windows and on held-out",
        "ones, with what came before replaced as well.",
        "",
        "| layer | by | shares layer | error | held-out error | bytes |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"{row['option']} on a fold" if row.get("on_fold") else row["option"]
        source = "-" if row.get("source") is None else row["source"]
        errors = " | ".join("-" if e is None else f"{e:.4f}" for e in row["errors"])
        lines.append(f"| {row['block']} | {name} | {source} | {errors} | {row['bytes']} |")
    return "\n".join([*lines, ""])
