"""The reports of `eval` and `compare`: tables on one page, and the trade-off of recipes as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsurgery import __version__
from llmsurgery.checkpoint.oserrors import writing
from llmsurgery.errors import UsageError
from llmsurgery.report.numbers import format_number
from llmsurgery.report.page import page_template
from llmsurgery.report.strips import interval_text

SIDE, MARGIN = 320, 36


@dataclass(frozen=True)
class Section:
    """A table of a page.

    Attributes:
        title: What it shows.
        columns: Heads; the first names the rows.
        rows: Cells as text.
        note: What a reader must know of it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Point:
    """A recipe in the picture of the trade-off.

    Attributes:
        x: From the left.
        y: From above.
        label: The recipe.
        front: Whether it lies on the Pareto front.
        text: Its figures.
    """

    x: float
    y: float
    label: str
    front: bool
    text: str


def measurement_page(document: Mapping[str, Any]) -> str:
    """Return the report of `eval` as HTML.

    Args:
        document: What `evaluate_checkpoints` or `evaluate_logs` returns.
    """
    models, settings = document["models"], document["evaluation"]
    columns = {model["path"]: model["metrics"] for model in models}
    if document.get("source"):
        columns = {f"{document['source']['path']} (source)": document["source"]["metrics"], **columns}
    names = dict.fromkeys(name for figures in columns.values() for name in figures)
    rows = [(name, *(_figure(figures.get(name)) for figures in columns.values())) for name in names]
    note = f"Protocol {settings['protocol']}: figures of another protocol do not compare. In brackets: 95% interval."
    sections = [Section("Figures", ("metric", *columns), rows, note)]
    gates = [(model, gate) for model in models for gate in model["gates"]]
    if gates:
        cells = [
            (gate["gate"], model["path"], format_number(gate["limit"]), format_number(gate["value"]), _outcome(gate))
            for model, gate in gates
        ]
        sections.insert(0, Section("Gates", ("gate", "model", "limit", "value", "outcome"), cells))
    sections += [_attacks(model["path"], found) for model in models if (found := model.get("attacks"))]
    data = [(name, Path(entry["path"]).name, str(entry["rows"]), entry["sha256"]) for name, entry in _data(document)]
    sections += [Section("Data", ("name", "file", "rows", "SHA-256"), data)] if data else []
    failed = sum(not gate["passed"] for _, gate in gates)
    verdict = ("plain", "Measured; no gate was set")
    if gates:
        verdict = (
            ("bad", f"{failed} of {len(gates)} gates failed") if failed else ("good", f"All {len(gates)} gates held")
        )
    return _render("eval", ", ".join(model["path"] for model in models), verdict, sections, ())


def comparison_page(
    document: Mapping[str, Any],
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    points: Sequence[tuple[str, float, float]],
    retained: bool,
) -> str:
    """Return the report of `compare` as HTML.

    Args:
        document: What `compare` returns.
        table: Head and cells.
        points: Label, share kept of the forget rows, share kept of the rest (or the perplexity ratio).
        retained: Whether the rest is other rows; else less of it is better.
    """
    note = "Kept: share of the token probability before. * on the Pareto front of forgetting and keeping."
    failed = [row["label"] for row in document["rows"] if row["exit_code"]]
    verdict = ("bad", f"Ended in an error: {', '.join(failed)}") if failed else ("good", "Every recipe ran to its end")
    sections = [Section("Recipes", table[0], table[1], note)]
    axes = ("forget rows kept (less is better)", "other rows kept" if retained else "perplexity ratio (less is better)")
    drawn = _points(points, document["front"])
    return _render("compare", f"{len(document['rows'])} recipes", verdict, sections, drawn, axes, _ends(points))


def write_page(path: str, page: str) -> None:
    """Write a page.

    Raises:
        ResourceError: It cannot be written.
    """
    with writing(Path(path)):
        Path(path).write_text(page, "utf-8")


def check_page(path: str) -> None:
    """Refuse a page that could not be written, before any work.

    Raises:
        UsageError: The file exists or has no folder.
    """
    place = Path(path)
    if place.exists():
        raise UsageError(f"{path} exists", "a report is never overwritten", "give --report another name")
    if not place.parent.is_dir():
        raise UsageError(f"the folder of {path} does not exist", "the report has no place", "make the folder first")


def _render(
    command: str,
    what: str,
    verdict: tuple[str, str],
    sections: Sequence[Section],
    points: Sequence[Point],
    axes: tuple[str, str] = ("", ""),
    ends: tuple[float, float] = (1.0, 1.0),
) -> str:
    picture = {"side": SIDE, "margin": MARGIN, "points": points, "axes": axes, "ends": ends}
    return page_template("tables.html").render(
        command=command, what=what, verdict=verdict, sections=sections, picture=picture, version=__version__
    )


def _figure(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    interval = interval_text(figure["interval"])
    return format_number(figure["value"]) + (f" ({interval})" if interval else "")


def _outcome(gate: Mapping[str, Any]) -> str:
    return "held" if gate["passed"] else "failed"


def _attacks(model: str, attacks: Mapping[str, Any]) -> Section:
    keys = ("source", "before", "after", "recovery", "control_gain", "excess")
    rows = [
        (name, *(format_number(found[key]) for key in keys), f"{found['n']} {found['unit']}", found["verdict"])
        for name, found in attacks.items()
    ]
    heads = ("attack", *(key.replace("_", " ") for key in keys), "of", "verdict")
    return Section(f"Attacks on {model}", heads, rows, "Recovery: the share of what was forgotten that comes back.")


def _data(document: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    entries = document.get("data") or {}
    return [(name, entry) for name, entry in entries.items() if isinstance(entry, Mapping) and "sha256" in entry]


def _ends(points: Sequence[tuple[str, float, float]]) -> tuple[float, float]:
    """Return the ends of both axes: the largest values, at least 1."""
    return max([1.0, *(forget for _, forget, _ in points)]), max([1.0, *(rest for _, _, rest in points)])


def _points(points: Sequence[tuple[str, float, float]], front: Sequence[str]) -> list[Point]:
    (right, top), room = _ends(points), SIDE - 2 * MARGIN
    return [
        Point(
            round(MARGIN + room * forget / right, 1),
            round(SIDE - MARGIN - room * rest / top, 1),
            label,
            label in front,
            f"{label}: forget {forget:.3g}, other {rest:.3g}",
        )
        for label, forget, rest in points
    ]
