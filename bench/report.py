"""What was measured, for people: a table a case, a comparison, and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.compare import Comparison
from bench.records import FORWARDS, Record, Results
from engine.artifacts import write_whole

# Okabe and Ito's colours and two more: told apart by the colour-blind, and by their markers in grey.
LOOKS = {
    "packed": ("#D55E00", "o"),
    "reordered": ("#8B0000", "d"),
    "layered": ("#F0E442", "p"),
    "rowstep": ("#A50F15", "h"),
    "expanded": ("#E69F00", "s"),
    "batch": ("#CC79A7", "^"),
    "naive": ("#000000", "D"),
    "hooks": ("#0072B2", "v"),
    "hooks-batch": ("#56B4E9", "P"),
    "transformer_lens": ("#009E73", "X"),
    "nnsight": ("#8C564B", "<"),
    "nnsight-invokes": ("#BCA136", ">"),
    "pyvene": ("#6A51A3", "*"),
    "one stock forward": ("#777777", "1"),
    "one forward": ("#777777", "2"),
}


def tables(results: Results) -> list[Table]:
    """One for each case on each model."""
    from bench.cases import CASES

    made = []
    for where, group in groupby(results.records, key=lambda r: (r.case, r.shape, r.dtype, r.device, r.backend)):
        case, shape, dtype, device, backend = where
        by = "" if backend == "huggingface" else f", ours by {backend}"
        table = Table(title=f"{CASES[case].title}: {shape}, {dtype}, {device}{by}", title_style="bold")
        for name in ("T", "rows", "way"):
            table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
        for name in ("ms (quartiles)", "rows/s", "tokens\na row", "peak\nMiB", "% of\nfloor", "hooks\n/ this"):
            table.add_column(name, justify="right", no_wrap=True)
        for name in ("naive\n/ this", "this /\nstock", "this /\nour", "apart"):
            table.add_column(name, justify="right", no_wrap=True)
        for (tokens, rows), cell in groupby(group, key=lambda r: (r.tokens, r.rows)):
            records = list(cell)
            for record in records:
                table.add_row(str(tokens), str(rows), *_line(record))
            floors = next(((r.prefill_floor, r.row_floor, r.floor) for r in records if r.floor is not None), None)
            if floors:
                prefill, row, whole = (_ms(x) for x in floors)
                line = ("floor (prefill, rows)", f"{whole} ({prefill}, {row})", "", "", "", "100")
                table.add_row(str(tokens), str(rows), *(f"[dim]{cell}[/]" for cell in line), end_section=True)
        made.append(table)
    return made


def left_out(results: Results) -> Table | None:
    """Whatever was not timed, and why; cells that have it in common are one line."""
    table = Table("way", "", "why", "case: T x rows", "model", title="not timed, or not measured in full")
    same: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for r in results.records:
        if r.reason:
            model = f"{r.shape} {r.dtype} {r.device}"
            cells = same.setdefault((r.provider, r.status, r.reason, model), {})
            cells.setdefault(r.case, []).append(f"{r.tokens} x {r.rows}")
    for (way, status, reason, model), cells in same.items():
        everywhere = len(cells) == len({r.case for r in results.records})
        where = "all" if everywhere else "; ".join(f"{case}: {', '.join(some)}" for case, some in cells.items())
        table.add_row(way, status, reason, where, model)
    return table if table.row_count else None


def compared(comparisons: Sequence[Comparison]) -> Table:
    """Medians of two runs."""
    table = Table("case", "way", "T", "rows", "model", title="against the old run")
    for name in ("old ms", "new ms", "new / old", "beside stock", "p", "verdict"):
        table.add_column(name, justify="right")
    style = {"slower": "red", "faster": "green"}
    for c in comparisons:
        r, colour = c.new, style.get(c.verdict, "dim")
        old, new = (_ms(one.median) for one in (c.old, r))
        line = (r.case, r.provider, str(r.tokens), str(r.rows), f"{r.shape} {r.dtype} {r.device}", old, new)
        table.add_row(*line, f"{c.ratio:.2f}", f"{c.beside:.2f}", f"{c.p:.1g}", f"[{colour}]{c.verdict}[/]")
    return table


def picture(path: str | Path, records: Sequence[Record]) -> bool:
    """Time against T, and peak memory against rows, of the first case and model; False if nothing was measured."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    measured = [r for r in records if r.status == "measured"]
    if not measured:
        return False
    first = measured[0]
    same = [r for r in measured if (r.case, r.shape, r.dtype, r.device) == _where(first)]
    names = list(dict.fromkeys(r.provider for r in same))
    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in names:
        colour, marker = LOOKS[name]
        line: dict[str, Any] = dict(color=colour, marker=marker, markersize=5, linewidth=1.3, label=name)
        line["linestyle"] = ":" if name in FORWARDS else "-"
        times = sorted((r.tokens, r.median) for r in same if r.provider == name and r.rows == first.rows)
        left.plot(*zip(*times, strict=True), **line)
        peaks = sorted((r.rows, r.memory) for r in same if r.provider == name and r.tokens == first.tokens and r.memory)
        if peaks:
            right.plot(*zip(*peaks, strict=True), **line)
    floors = sorted({(r.tokens, r.floor) for r in same if r.floor and r.rows == first.rows})
    left.plot(*zip(*floors, strict=True), color="#999999", linestyle="--", linewidth=1, label="floor")
    left.set(xscale="log", yscale="log", xlabel="prompt length T (tokens)", ylabel=f"seconds for {first.rows} rows")
    right.set(
        xscale="log", yscale="log", xlabel="rows", ylabel=f"peak memory beyond the weights (MiB), T={first.tokens}"
    )
    for axes, ticks in ((left, {r.tokens for r in same}), (right, {r.rows for r in same})):
        axes.set_xticks(sorted(ticks), [str(n) for n in sorted(ticks)])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    if not right.lines:
        right.text(0.5, 0.5, "not measured", ha="center", transform=right.transAxes)
    lines = {line.get_label(): line for axes in (right, left) for line in axes.lines}
    shown = [label for label in (*LOOKS, "floor") if label in lines]
    figure.legend([lines[label] for label in shown], shown, loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(f"{first.case}: {first.shape}, {first.dtype}, {first.device}", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getvalue())
    return True


def _where(r: Record) -> tuple[str, str, str, str]:
    return r.case, r.shape, r.dtype, r.device


def _line(r: Record) -> list[str]:
    if r.status != "measured":
        return [f"[dim]{r.provider}[/]", f"[dim]{r.status}[/]", *[""] * 8, _number(r.apart, "{:.0e}")]
    time = f"{_ms(r.median)} ({_ms(r.low)}-{_ms(r.high)})"
    if r.baseline:
        return [f"[dim]{r.provider}[/]", time, "", f"{r.computed:.0f}", _mib(r.memory), *[""] * 6]
    fewer = "*" if r.rows_run != r.rows else ""
    return [
        r.provider + fewer,
        time,
        _number(r.rows_per_second, "{:.3g}"),
        _number(r.computed, "{:.1f}"),
        _mib(r.memory),
        _number(r.percent_of_floor, "{:.0f}"),
        *(_times(r.speedup.get(name)) for name in ("hooks", "naive")),
        *(_times(r.cost.get(name)) for name in ("one stock forward", "one forward")),
        _number(r.apart, "{:.0e}"),
    ]


def _number(x: float | None, form: str) -> str:
    return "" if x is None else form.format(x)


def _mib(x: float | None) -> str:
    return "" if x is None else f"{x:.{0 if x >= 100 else 1}f}"


def _times(found: dict[str, float] | None) -> str:
    return "" if not found else f"{found['median']:.3g}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f}"
