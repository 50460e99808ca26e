"""Scores of layers as a page of HTML with inline SVG: no script, no network, light and dark.

removal_page    one row an iteration, one cell a layer; what went is ringed
survey_page     one bar a layer for every metric
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape

from rsprune.report import Report

SCORES_NAME = "rsprune-scores.html"

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --text: #1f2328; --soft: #59636e;
  --line: #d1d9e0; --mark: #2f6fb5; --gone: #c4432b; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --text: #e6e9ec; --soft: #9aa4ae;
  --line: #3a424a; --mark: #6aaaf0; --gone: #ff8a6b; } }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif;
  max-width: 1060px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.05rem; margin: 1.8rem 0 .3rem; }
p { margin: .2rem 0 .6rem; color: var(--soft); }
.scroll { overflow-x: auto; } svg { display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.mark { fill: var(--mark); } .gone { fill: var(--gone); }
.ring { fill: none; stroke: var(--gone); stroke-width: 2.5; }
.kept { fill: none; stroke: var(--line); } .axis { stroke: var(--line); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .1rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
"""
CELL, GAP, LEFT, TOP = 26, 3, 92, 22
BAR_HEIGHT, LOG_FROM = 110, 30.0
"""Bars are logarithmic where the largest is so many times the smallest."""


def removal_page(report: Report) -> str:
    """The scores of a depth run, iteration by iteration.

    Args:
        report: with its removals.
    """
    run, config = report.run, report.run.get("config") or {}
    method = str(config.get("method"))
    norm = f", norm {config.get('pip_norm')}" if method == "pip" else ""
    rows = [
        (int(record["removed"]), {int(k): float(v) for k, v in record["scores"].items()})
        for record in report.removals
    ]
    heading = f"{run.get('model')}: {len(rows)} of {run.get('layers')} decoder layers removed"
    explained = (
        f"Method {method}{norm}. A row is an iteration, a column a layer of the dense model. The "
        "fuller a cell, the higher the layer's rank in its row; the ringed one had the lowest "
        "score and went. Empty frames are protected layers."
    )
    parts = [
        _section("Scores by layer and iteration", explained, _grid(rows, int(run["layers"]))),
        _section("The first iteration", "Before anything was removed.",
                 _bars(rows[0][1], {rows[0][0]}, int(run["layers"]))),
        _section("Numbers", "", _table(["layer", *(f"iteration {i + 1}" for i in range(len(rows)))],
                 [scores for _, scores in rows])),
    ]  # fmt: skip
    return _page(heading, parts)


def survey_page(model: str, layers: int, metrics: Mapping[str, Mapping[int, float]]) -> str:
    """Scores of all layers by all metrics.

    Args:
        model: its name.
        layers: how many there are.
        metrics: metric -> layer -> score.
    """
    parts = [
        _section(name, f"Lowest: {', '.join(map(str, _lowest(scores)))}.",
                 _bars(scores, set(_lowest(scores)[:1]), layers))
        for name, scores in metrics.items()
    ]  # fmt: skip
    parts.append(_section("Numbers", "", _table(["layer", *metrics], list(metrics.values()))))
    return _page(f"{model}: scores of {layers} decoder layers", parts)


def _lowest(scores: Mapping[int, float]) -> list[int]:
    return sorted(scores, key=lambda index: (scores[index], index))[:5]


def _page(heading: str, parts: Iterable[str]) -> str:
    title = escape(heading)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>\n{''.join(parts)}</body></html>\n"
    )


def _section(heading: str, text: str, content: str) -> str:
    words = f"<p>{escape(text)}</p>" if text else ""
    return f'<h2>{escape(heading)}</h2>{words}\n<div class="scroll">{content}</div>\n'


def _svg(width: float, height: float, label: str, shapes: Iterable[str]) -> str:
    box = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg {box} role="img" aria-label="{escape(label)}">{"".join(shapes)}</svg>'


def _text(x: float, y: float, content: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(content)}</text>'


def _numbers(layers: int, y: float) -> list[str]:
    """The layers' numbers above or below their columns."""
    return [_text(LEFT + index * CELL + CELL / 2, y, str(index)) for index in range(layers)]


def _grid(rows: Sequence[tuple[int, Mapping[int, float]]], layers: int) -> str:
    shapes, gone = _numbers(layers, TOP - 8), set[int]()
    side = CELL - GAP
    for number, (removed, scores) in enumerate(rows):
        y = TOP + number * CELL
        shapes.append(_text(LEFT - 10, y + CELL / 2 + 3, f"iteration {number + 1}", "end"))
        order = sorted(scores, key=lambda index: scores[index])
        for index in range(layers):
            x = LEFT + index * CELL
            place = f'x="{x + GAP / 2:g}" y="{y + GAP / 2:g}" rx="3" width="{side}" height="{side}"'
            if index in scores:
                share = 0.1 + 0.9 * order.index(index) / max(len(order) - 1, 1)
                told = f"<title>layer {index}: {scores[index]:.5g}</title>"
                shapes.append(
                    f'<rect class="mark" fill-opacity="{share:.2f}" {place}>{told}</rect>'
                )
            elif index not in gone:
                shapes.append(f'<rect class="kept" {place}/>')
            if index == removed:
                shapes.append(f'<rect class="ring" {place}/>')
        gone.add(removed)
    label = "scores of layers, iteration by iteration"
    return _svg(LEFT + layers * CELL + GAP, TOP + len(rows) * CELL + GAP, label, shapes)


def _bars(scores: Mapping[int, float], marked: Collection[int], layers: int) -> str:
    low, high = min(scores.values()), max(scores.values())
    logarithmic = low > 0 and high / low > LOG_FROM
    base = TOP + BAR_HEIGHT

    # From zero, unless all bars would then look alike; the foot's value stands beside it.
    foot = low if logarithmic else 0.0 if 0 <= low < high / 3 else low - (high - low) / 10

    def height(value: float) -> float:
        if logarithmic:
            return 4 + (BAR_HEIGHT - 4) * math.log(value / low) / math.log(high / low)
        return 1 + (BAR_HEIGHT - 1) * (value - foot) / ((high - foot) or 1.0)

    right = LEFT + layers * CELL
    shapes = [f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{base}" y2="{base}"/>']
    shapes += _numbers(layers, base + 14)
    shapes.append(_text(LEFT - 8, TOP + 8, f"{high:.4g}", "end"))
    shapes.append(_text(LEFT - 8, base, f"{foot:.4g}", "end"))
    if logarithmic:
        shapes.append(_text(LEFT - 8, TOP + BAR_HEIGHT / 2, "logarithmic", "end"))
    for index, value in scores.items():
        tall, kind = height(value), "gone" if index in marked else "mark"
        place = f'x="{LEFT + index * CELL + GAP:g}" y="{base - tall:.1f}" rx="2"'
        size = f'width="{CELL - 2 * GAP}" height="{tall:.1f}"'
        told = f"<title>layer {index}: {value:.5g}</title>"
        shapes.append(f'<rect class="{kind}" {place} {size}>{told}</rect>')
    return _svg(LEFT + layers * CELL + GAP, base + 22, "scores by layer", shapes)


def _table(heads: Sequence[str], columns: Sequence[Mapping[int, float]]) -> str:
    layers = sorted({index for column in columns for index in column})
    lines = ["".join(f"<th>{escape(head)}</th>" for head in heads)]
    for index in layers:
        cells = (f"{c[index]:.5g}" if index in c else "" for c in columns)
        lines.append(f"<td>{index}</td>" + "".join(f"<td>{cell}</td>" for cell in cells))
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"
