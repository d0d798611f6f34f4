"""Terminal tables built from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from llmsurgery.report.numbers import format_number


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """Return the before/after table of a manifest's metrics."""
    table = Table(title="before and after", title_justify="left")
    aligned = any("aligned" in metric for metric in metrics.values())
    middle = ("aligned", "before", "after", "95% interval") if aligned else ("before", "after", "95% interval")
    for column, justify in (("metric", "left"), *((name, "right") for name in middle)):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("rows", justify="right")
    table.add_column("better")
    for name, metric in metrics.items():
        table.add_row(
            name,
            *([format_number(metric["aligned"]["value"]) if "aligned" in metric else ""] if aligned else []),
            format_number(metric["before"]["value"]),
            format_number(metric["after"]["value"]),
            _interval(metric["after"]["interval"]),
            str(metric["after"]["n"]),
            metric["direction"],
        )
    return table


def figures_table(models: Mapping[str, Mapping[str, Any]], protocol: str) -> Table:
    """Return one column per model and one row per metric, with the protocol of each."""
    table = Table()
    table.add_column("metric", no_wrap=True)
    for name in models:
        table.add_column(name, justify="right")
    table.add_column("rows", justify="right")
    table.add_column("protocol")
    rows: dict[str, None] = dict.fromkeys(metric for figures in models.values() for metric in figures)
    for metric in rows:
        figures = [models[name].get(metric) for name in models]
        counts = {str(figure["n"]) for figure in figures if figure}
        table.add_row(metric, *(_with_interval(figure) for figure in figures), "/".join(sorted(counts)), protocol)
    return table


def attacks_table(model: str, attacks: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return one row per attack on a model: knowledge scores, what came back, and the verdict."""
    table = Table(title=f"attacks on {model}", title_justify="left")
    table.add_column("attack", no_wrap=True)
    for column in ("source", "before", "after", "control", "recovery", "control gain", "excess", "of"):
        table.add_column(column, justify="right")
    table.add_column("verdict", no_wrap=True)
    table.add_column("strongest point")
    for name, found in attacks.items():
        control = found["control"]
        table.add_row(
            name,
            *(format_number(found[key]) for key in ("source", "before", "after")),
            "" if control is None else " to ".join(format_number(control[key]) for key in ("before", "after")),
            *(format_number(found[key]) for key in ("recovery", "control_gain", "excess")),
            f"{found['n']} {found['unit']}",
            found["verdict"],
            found["point"] or "",
        )
    return table


def _with_interval(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    interval = _interval(figure["interval"])
    return f"{format_number(figure['value'])}  {interval}".rstrip()


def _interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:.3g}, {interval[1]:.3g}]"


def coverage_table(coverage: Sequence[Mapping[str, Any]]) -> Table:
    """Return the coverage table: tensors targeted, matched and changed per role."""
    table = Table(title="coverage", title_justify="left")
    table.add_column("role")
    for column in ("targeted", "matched", "changed"):
        table.add_column(column, justify="right")
    for row in coverage:
        table.add_row(row["role"], str(row["targeted"]), str(row["matched"]), str(row["changed"]))
    return table


def rows_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> Table:
    """Return a plain table; numbers are set flush right."""
    table = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[position], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        # Text, not markup: names and values may hold square brackets.
        table.add_row(*(Text(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row))
    return table
