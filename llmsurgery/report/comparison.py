"""A comparison of recipes as terminal table, Markdown and picture."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from llmsurgery.checkpoint.oserrors import writing
from llmsurgery.checkpoint.target import Claim, check_free, move_into_place, remove
from llmsurgery.compute.progress import Progress
from llmsurgery.report.table import rows_table
from llmsurgery.report.tables_page import comparison_page
from llmsurgery.run.compare import RETAIN, UNSEEN, Attacking, Recipe, compare_recipes, trade_off
from llmsurgery.run.request import Request

COLUMNS = (
    "recipe",
    "front",
    "forget kept",
    "retain kept",
    "unseen kept",
    "perplexity ratio",
    "steps",
    "seconds",
    "peak MiB",
)


def comparison_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return head and cells of the table; attacks add a column each."""
    attacks = list(dict.fromkeys(name for row in document["rows"] for name in _attacks(row)))
    figures = [(name, key) for name in attacks for key in ("recovery", "excess")]
    head = [*COLUMNS, *(f"{name} {key}" for name, key in figures)]
    lines = []
    for row in document["rows"]:
        if row["exit_code"] != 0:
            error = row["error"] or {}
            line = [row["label"], "", f"exit {row['exit_code']}: {error.get('what', '')}"]
            lines.append(line + [""] * (len(head) - len(line)))
            continue
        kept, cost = row["shares"], row["cost"]
        memory = cost.get("device_bytes") or cost["rss_bytes"]
        line = [
            row["label"],
            "*" if row["label"] in document["front"] else "",
            _number(kept.get("forget.token_prob")),
            _number(kept.get("retain.token_prob")),
            _number(kept.get(UNSEEN)),
            _number(kept.get("utility.ppl_ratio")),
            str(row["record"].get("steps", "")),
            f"{cost['seconds']:.0f}",
            f"{memory / 2**20:,.0f}",
        ]
        found = _attacks(row)
        lines.append(line + [_number(found[name].get(key)) if name in found else "" for name, key in figures])
    optional = {"unseen kept", *(f"{name} excess" for name in attacks)}
    filled = [place for place, name in enumerate(head) if any(line[place] for line in lines) or name not in optional]
    return [head[place] for place in filled], [[line[place] for place in filled] for line in lines]


def _attacks(row: Mapping[str, Any]) -> Mapping[str, Any]:
    found = row.get("attacks") or {}
    return {} if "exit_code" in found else found


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def comparison_table(document: Mapping[str, Any]) -> Table:
    """Return the table for the terminal."""
    head, lines = comparison_rows(document)
    return rows_table(head, lines, "recipes (* on the Pareto front of forget and retain)")


def comparison_markdown(document: Mapping[str, Any]) -> str:
    """Return the table as Markdown."""
    head, lines = comparison_rows(document)
    rows = [head, ["---"] * len(head), *lines]
    escaped = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(escaped) + "\n\n`*`: on the Pareto front; kept: share of the token probability before.\n"


def draw_front(points: Sequence[tuple[str, float, float]], front: Sequence[str], retained: bool, path: Path) -> None:
    """Draw the trade-off as a picture; the format follows from the file's ending.

    Args:
        points: Label, share kept of the forget rows, share kept of the rest.
        front: Labels on the Pareto front.
        retained: Whether the rest is other rows, else it is the negative perplexity ratio.
        path: `.svg` or `.png`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for label, forget, rest in points:
        on_front = label in front
        height = rest if retained else -rest
        axes.plot(forget, height, "o", color="tab:blue" if on_front else "tab:gray")
        axes.annotate(label, (forget, height), xytext=(5, 4), textcoords="offset points", fontsize=8)
    line = sorted((forget, rest if retained else -rest) for label, forget, rest in points if label in front)
    axes.plot([x for x, _ in line], [y for _, y in line], "-", color="tab:blue", linewidth=1)
    axes.set_xlabel("forget rows: token probability kept (less is better)")
    axes.set_ylabel("other rows: token probability kept" if retained else "perplexity ratio (less is better)")
    axes.grid(alpha=0.3)
    # A fixed date and salt keep the bytes the same from run to run.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def publish_comparison(
    recipes: Sequence[Recipe],
    request: Request,
    attacks: Attacking,
    out: str | None,
    keep: bool,
    progress: Progress,
    unseen: str | None = None,
    report: bool = False,
) -> dict[str, object]:
    """Run a comparison and write it as JSON, Markdown and, where matplotlib is there, a picture.

    Args:
        recipes: What is compared.
        request: Model, data and options for all.
        attacks: Attacks that every result is put to.
        out: Output directory; None for a new one below `llmsurgery-out`.
        keep: Keep the results below the output.
        progress: Told of every run.
        unseen: Data file of rows like the retain rows that no recipe is given.
        report: Leave a page for people as well.

    Returns:
        The JSON document.
    """
    place = Path(out) if out is not None else _free_name()
    check_free(place, request.force)
    claim = Claim(place, request.force)
    try:
        document = compare_recipes(recipes, request, attacks, claim.path if keep else None, progress, unseen)
        document["out"] = str(place)
        with writing(claim.path):
            (claim.path / "compare.json").write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", "utf-8")
            (claim.path / "compare.md").write_text(comparison_markdown(document), "utf-8")
            if report:
                page = comparison_page(document, comparison_rows(document), _points(document), _retained(document))
                (claim.path / "report.html").write_text(page, "utf-8")
        _picture(document, claim.path / "compare.svg", progress)
        aside = move_into_place(claim.path, place, request.force)
    except BaseException:
        claim.discard()
        raise
    claim.release()
    if aside is not None:
        remove(aside)
    return document


def _free_name() -> Path:
    folder, number = Path("llmsurgery-out"), 1
    while True:
        place = folder / ("compare" if number == 1 else f"compare-{number:03d}")
        if not place.exists() and not place.with_name(f"{place.name}.partial").exists():
            return place
        number += 1


def _picture(document: Mapping[str, Any], path: Path, progress: Progress) -> None:
    points = _points(document)
    if not points:
        return
    if importlib.util.find_spec("matplotlib") is None:
        progress.notice("no picture: matplotlib is not installed (extra `pictures`)")
        return
    draw_front(points, document["front"], _retained(document), path)


def _points(document: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    return [(row["label"], *point) for row in document["rows"] if (point := trade_off(row)) is not None]


def _retained(document: Mapping[str, Any]) -> bool:
    return any({RETAIN, UNSEEN} & set(row.get("shares", {})) for row in document["rows"])
