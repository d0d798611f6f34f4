"""A short Markdown summary of a run or a measurement, for the page of a job in continuous integration.

It is appended to what other steps of the job wrote, and may be read by more people than the data: figures, gates and
notes are in it, rows of data are not.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmsurgery.report.comparison import comparison_markdown
from llmsurgery.report.numbers import format_number
from llmsurgery.report.page import cost_items, model_of, title_of, verdict
from llmsurgery.report.strips import interval_text, strips


def run_summary(manifest: Mapping[str, Any]) -> str:
    """Return the summary of an operation or a recipe from its manifest, or of a search in vain from its list."""
    if "operations" not in manifest:
        return f"### ❌ llmsurgery: none of {len(manifest['trials'])} trials held the gates\n\n"
    kind, sentence = verdict(manifest)
    mark = {"good": "✅ ", "bad": "❌ "}.get(kind, "")
    model = f"<code>{_plain(model_of(manifest))}</code>"
    lines = [f"### {mark}llmsurgery {_plain(title_of(manifest))}", "", f"{sentence}. Model: {model}"]
    lines += _gates(manifest["gates"])
    metrics = strips(manifest["metrics"])
    lines += _table(
        ("metric", "before", "after", "95% interval", "change", "rows", "wanted"),
        [
            (m.name, m.before, m.after, m.after_interval, f"{m.change} {m.verdict}", m.rows, m.direction)
            for m in metrics
        ],
    )
    if notices := manifest["notices"]:
        lines += ["", *(f"- {_plain(notice)}" for notice in notices)]
    lines += ["", ", ".join(f"{name} {amount}" for name, amount in cost_items(manifest["cost"])) + "."]
    return "\n".join(lines) + "\n\n"


def measurement_summary(document: Mapping[str, Any]) -> str:
    """Return the summary of `eval`: one column per model, and the gates of each."""
    models = document["models"]
    columns = {model["path"]: model["metrics"] for model in models}
    if document.get("source"):
        columns = {f"{document['source']['path']} (source)": document["source"]["metrics"], **columns}
    gates = [
        {**gate, "step": model["path"] if len(models) > 1 else None} for model in models for gate in model["gates"]
    ]
    failed = sum(not gate["passed"] for gate in gates)
    title = (
        f"{failed} of {len(gates)} gates failed" if failed else f"all {len(gates)} gates held" if gates else "measured"
    )
    mark = "❌ " if failed else "✅ " if gates else ""
    names = dict.fromkeys(name for figures in columns.values() for name in figures)
    rows = [(name, *(_figure(figures.get(name)) for figures in columns.values())) for name in names]
    lines = [f"### {mark}llmsurgery eval: {title}", *_gates(gates, "model"), *_table(("metric", *columns), rows)]
    return "\n".join(lines) + "\n\n"


def comparison_summary(document: Mapping[str, Any]) -> str:
    """Return the summary of `compare`: its own table."""
    return f"### llmsurgery compare\n\n{comparison_markdown(document)}\n"


def _gates(gates: Sequence[Mapping[str, Any]], of: str = "step") -> list[str]:
    if not gates:
        return []
    several = any(gate.get("step") for gate in gates)
    rows = [
        (
            *((gate.get("step") or "",) if several else ()),
            gate["gate"],
            format_number(gate["limit"]),
            format_number(gate["value"]),
            "held" if gate["passed"] else "❌ failed",
        )
        for gate in gates
    ]
    return _table((*((of,) if several else ()), "gate", "limit", "value", "outcome"), rows)


def _figure(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    interval = interval_text(figure["interval"])
    return format_number(figure["value"]) + (f" ({interval})" if interval else "")


def _table(columns: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    if not rows:
        return []
    lines = ["", _row(columns), "|" + "---|" * len(columns)]
    return lines + [_row(row) for row in rows]


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(_plain(str(cell)) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Return a text as Markdown that shows it as it stands: no tag, link, picture, emphasis, cell or line begins."""
    return re.sub(r"([\\`*_\[\]|!#~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
