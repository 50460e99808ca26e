"""Tables of rich for people: of a report, a plan, a folder. All fit in 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rsprune.errors import one_line
from rsprune.progress import duration
from rsprune.report import DENSE, Report, by_kind, kind_of

if TYPE_CHECKING:
    from rsprune.estimate import Stage
    from rsprune.gguf_export import Exported
    from rsprune.inspect import TensorFacts, Totals
    from rsprune.plan import Operator, Plan

__all__ = [
    "certificate_table",
    "export_table",
    "inspect_table",
    "new_table",
    "pairs_table",
    "plan_table",
    "removal_table",
    "score_table",
    "size",
    "stage_table",
    "summary_table",
]


def certificate_table(report: Report, *, every: bool = False) -> Table:
    """Errors and sparsity: one row per operator kind, or with `every` one per tensor."""
    if every:
        return _every_tensor(report)
    table = new_table("operator", "tensors", "bits", "error", "held-out", "zeros", "time")
    for row in by_kind(report.tensors):
        errors = _number(row.error), _number(row.heldout_error)
        zeros, seconds = f"{row.sparsity:.1%}", duration(row.seconds)
        count, bits = str(row.count), _bits(row.true_bits)
        table.add_row(_name(row.kind), count, bits, *errors, zeros, seconds)
    table.caption = "bits: stored, of a weight; errors: geometric mean over the layers"
    if report.few_tokens:
        table.caption += f"\n{report.few_tokens}"
    return table


def removal_table(report: Report) -> Table:
    """Layers that went, in their order, each with its score and the lowest of those that stayed."""
    table = new_table("iteration", "removed layer", "score", "next lowest", "time")
    for record in report.removals:
        scores = dict(record["scores"])
        score = scores.pop(str(record["removed"]), None)
        following = _significant(min(scores.values(), default=None))
        row = str(record["removed"]), _significant(score), following, duration(record["seconds"])
        table.add_row(str(record["iteration"] + 1), *row)
    folds = [record["fold"] for record in report.layers if "fold" in record]
    folded = sum("after" in fold for fold in folds)
    table.caption = f"maps folded for {folded} of {len(folds)} removed spans" if folds else None
    return table


def score_table(scores: Mapping[str, Mapping[int, float]]) -> Table:
    """A row a decoder layer, a column a metric."""
    table = new_table("layer", *scores)
    for index in sorted({index for values in scores.values() for index in values}):
        table.add_row(str(index), *(_significant(values.get(index)) for values in scores.values()))
    return table


def _significant(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _every_tensor(report: Report) -> Table:
    table = new_table("tensor", "bits", "error", "held-out", "zeros", "pattern", "tokens")
    table.caption = report.few_tokens
    for record in report.tensors:
        errors = _number(record.get("error")), _number(record.get("heldout_error"))
        zeros = f"{record.get('sparsity') or 0.0:.1%}"
        planes = (record.get("pattern"), record.get("residual"))
        pattern = " + ".join(str(plane) for plane in planes if plane) or "-"
        tokens = str(record.get("tokens", "-"))
        bits = _bits(record.get("true_bits"))
        table.add_row(_name(record["name"]), bits, *errors, zeros, pattern, tokens)
    return table


def summary_table(report: Report) -> Table:
    """Where the time, the memory and the bytes of a run went."""
    summary = report.summary
    if summary is None:
        return pairs_table([("run", "unfinished: the report has no summary")])
    seconds = summary.get("seconds") or {}
    rows = [("bits per weight", report.bits)] if report.bits else []
    rows += [(stage, duration(value)) for stage, value in seconds.items()]
    if "passes_per_layer" in summary:
        rows.append(("passes per layer", _plain(summary["passes_per_layer"])))
    rows.append(("peak memory (anonymous)", size(summary.get("peak_rss_anon"))))
    rows.append(("  held by the imports", size(summary.get("import_rss_anon"))))
    rows.append(("written", size(summary.get("bytes_written"))))
    weights, zeros = summary.get("weights") or 0, summary.get("zeros") or 0
    if weights:
        rows.append(("zeros", f"{zeros:,} of {weights:,} weights ({zeros / weights:.1%})"))
    rows.append(("folder", str(report.folder)))
    return pairs_table(rows)


def inspect_table(
    facts: Sequence[TensorFacts], total: Totals, *, every: bool = False
) -> RenderableType:
    """What lies in a checkpoint: one row per kind of tensor, or with `every` one per tensor."""
    table = new_table("tensor", "", "dtype", "shape", "pattern", "zeros", "size", "bits")
    groups: dict[Any, list[TensorFacts]] = {}
    for fact in facts:
        kind = fact.name if every else kind_of(fact.name)
        pattern = _pattern_class(fact, every)
        form = fact.format.partition(" ")[0]
        groups.setdefault((kind, fact.dtype, fact.shape, pattern, form), []).append(fact)
    for (kind, dtype, shape, pattern, form), members in groups.items():
        zeros = sum(member.sparsity for member in members) / len(members)
        weights = sum(math.prod(member.shape) for member in members)
        nbytes = sum(member.nbytes for member in members)
        table.add_row(
            _name(kind),
            "" if every else f"{len(members)}x",
            dtype if form == DENSE else form,
            "x".join(map(str, shape)) or "scalar",
            pattern,
            f"{zeros:.1%}",
            size(nbytes),
            f"{nbytes * 8 / max(weights, 1):.4g}",
        )
    return Group(table, Text(_total_line(total)))


def _pattern_class(fact: TensorFacts, every: bool) -> str:
    """The pattern; unstructured ones of a kind differ in a digit and stand in one row."""
    if fact.pattern is None:
        return "-"
    return "unstruct." if fact.pattern.endswith("%") and not every else fact.pattern


def _total_line(total: Totals) -> str:
    share = total.zeros / max(total.weights, 1)
    packed = "" if total.packed_bits is None else f"{total.packed_bits:.3f} of packed linears, "
    return (
        f"bits per weight on disk: {packed}{total.bits_per_weight:.3f} of all files\n"
        f"{total.tensors} tensors, {total.weights:,} weights, {share:.1%} zeros, "
        f"{size(total.file_bytes)} of files"
    )


def export_table(found: Exported) -> RenderableType:
    """What a GGUF file holds, by kind of tensor and type."""
    table = new_table("tensor", "", "type", "size")
    groups: dict[tuple[str, str], list[int]] = {}
    for part in found.parts:
        groups.setdefault((kind_of(part.name), part.kind), []).append(part.nbytes)
    for (kind, stored), nbytes in groups.items():
        table.add_row(_name(kind), f"{len(nbytes)}x", stored, size(sum(nbytes)))
    table.caption = (
        f"{found.path}: {size(found.nbytes)}, {found.bits_per_weight:.3f} bits per weight; "
        f"{found.rounded:,} values rounded, by at most {found.largest_change:.2g}"
    )
    return table


def plan_table(plan: Plan) -> RenderableType:
    """What a run would do and what it would need."""
    room = "unknown" if plan.disk_free is None else size(plan.disk_free)
    facts = [
        ("model", str(plan.model)),
        ("architecture", f"{plan.architecture}, {plan.layers} decoder layers"),
        ("ignored linears", _ignored(plan.ignored)),
        ("passes", plan.passes),
        ("output", f"{size(plan.output_bytes)} (free on the disk: {room})"),
    ]
    if plan.spill_bytes:
        what = f" ({', '.join(plan.spill)})" if plan.spill else ""
        facts.append(("files of its own", f"{size(plan.spill_bytes)} while it runs{what}"))
    memory = [(f"  {part}", size(count)) for part, count in plan.memory]
    memory.append(("memory, at the peak", size(plan.peak_bytes)))
    memory.append(("memory, the limit", size(plan.memory_limit)))
    warnings = [Text(f"warning: {line}", style="yellow") for line in plan.warnings]
    operators = [_operators(plan.operators)] if plan.operators else []
    return Group(pairs_table(facts), *operators, pairs_table(memory), *warnings)


def stage_table(stages: Sequence[Stage]) -> RenderableType:
    """What every stage takes, by estimate; the last row is all of them together."""
    table = new_table("stage", "reads", "writes", "memory", "about")
    for stage in stages:
        about = duration(stage.seconds)
        moved = size(stage.reads), size(stage.writes)
        table.add_row(_name(stage.name), *moved, size(stage.peak), about)
    return table


def _operators(operators: Iterable[Operator]) -> Table:
    table = new_table("pruned operator", "tensors", "rows x columns", "dtype")
    counts: dict[tuple[str, str, str], int] = {}
    for operator in operators:
        shape = f"{operator.rows} x {operator.columns}"
        key = (kind_of(operator.name), shape, operator.dtype)
        counts[key] = counts.get(key, 0) + 1
    for (kind, shape, dtype), count in counts.items():
        table.add_row(_name(kind), str(count), shape, dtype)
    return table


def _ignored(names: Sequence[str]) -> str:
    kinds = list(dict.fromkeys(kind_of(name) for name in names))
    more = f" and {len(kinds) - 6} more kinds" if len(kinds) > 6 else ""
    return (", ".join(kinds[:6]) + more) or "none in the decoder layers"


def pairs_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns without a head: what, and how much."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(label), Text(value))
    return table


def size(count: int | None) -> str:
    """`123 B`, `4.5 KiB`, `1.2 GiB`; `-` if not known."""
    if count is None:
        return "-"
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1023.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def new_table(first: str, *others: str) -> Table:
    """Names on the left fold; the numbers on the right keep their width."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    table.add_column(first, overflow="fold")
    for head in others:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _name(name: str) -> Text:
    return Text(one_line(name))  # not markup: a name may hold brackets


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _plain(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
