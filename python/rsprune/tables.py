"""Tables of rich for people: of a report, a plan, a folder. All fit in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rsprune.errors import one_line
from rsprune.progress import duration
from rsprune.report import Report, by_kind, kind_of

if TYPE_CHECKING:
    from rsprune.estimate import Stage
    from rsprune.inspect import TensorFacts, Totals
    from rsprune.plan import Operator, Plan

__all__ = [
    "certificate_table",
    "inspect_table",
    "new_table",
    "pairs_table",
    "plan_table",
    "size",
    "stage_table",
    "summary_table",
]


def certificate_table(report: Report, *, every: bool = False) -> Table:
    """Errors and sparsity: one row per operator kind, or with `every` one per tensor."""
    if every:
        return _every_tensor(report)
    table = new_table("operator", "tensors", "error", "held-out", "zeros", "time")
    for row in by_kind(report.tensors):
        errors = _number(row.error), _number(row.heldout_error)
        zeros, seconds = f"{row.sparsity:.1%}", duration(row.seconds)
        table.add_row(_name(row.kind), str(row.count), *errors, zeros, seconds)
    table.caption = "errors: geometric mean over the layers"
    if report.few_tokens:
        table.caption += f"\n{report.few_tokens}"
    return table


def _every_tensor(report: Report) -> Table:
    table = new_table("tensor", "error", "held-out", "zeros", "pattern", "tokens", "time")
    table.caption = report.few_tokens
    for record in report.tensors:
        errors = _number(record.get("error")), _number(record.get("heldout_error"))
        zeros = f"{record.get('sparsity') or 0.0:.1%}"
        seconds = duration(record.get("seconds"))
        pattern, tokens = str(record.get("pattern")), str(record.get("tokens", "-"))
        table.add_row(_name(record["name"]), *errors, zeros, pattern, tokens, seconds)
    return table


def summary_table(report: Report) -> Table:
    """Where the time, the memory and the bytes of a run went."""
    summary = report.summary
    if summary is None:
        return pairs_table([("run", "unfinished: the report has no summary")])
    seconds = summary.get("seconds") or {}
    rows = [(stage, duration(value)) for stage, value in seconds.items()]
    rows.append(("passes per layer", _plain(summary.get("passes_per_layer"))))
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
        groups.setdefault((kind, fact.dtype, fact.shape, pattern), []).append(fact)
    for (kind, dtype, shape, pattern), members in groups.items():
        zeros = sum(member.sparsity for member in members) / len(members)
        table.add_row(
            _name(kind),
            "" if every else f"{len(members)}x",
            dtype,
            "x".join(map(str, shape)) or "scalar",
            pattern,
            f"{zeros:.1%}",
            size(sum(member.nbytes for member in members)),
            f"{members[0].bits_per_weight:g}",
        )
    return Group(table, Text(_total_line(total)))


def _pattern_class(fact: TensorFacts, every: bool) -> str:
    """The pattern; unstructured ones of a kind differ in a digit and stand in one row."""
    if fact.pattern is None:
        return "-"
    return "unstruct." if fact.pattern.endswith("%") and not every else fact.pattern


def _total_line(total: Totals) -> str:
    share = total.zeros / max(total.weights, 1)
    return (
        f"{total.tensors} tensors, {total.weights:,} weights, {share:.1%} zeros, "
        f"{size(total.file_bytes)} of files,\n{total.bits_per_weight:.3f} bits per weight on disk"
    )


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
    memory = [(f"  {part}", size(count)) for part, count in plan.memory]
    memory.append(("memory, at the peak", size(plan.peak_bytes)))
    memory.append(("memory, the limit", size(plan.memory_limit)))
    warnings = [Text(f"warning: {line}", style="yellow") for line in plan.warnings]
    return Group(pairs_table(facts), _operators(plan.operators), pairs_table(memory), *warnings)


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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _plain(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
