"""What the same amount of change reaches in another way: the table under every repair of alignment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from llmsurgery.report.numbers import format_number

CONTROLS = ("random-restore", "interpolate")
METRICS = ("safety.refusal_rate", "task.score")


class Controls(NamedTuple):
    """A table.

    Attributes:
        columns: Heads.
        rows: One row for the result and for each control.
        title: What it shows.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str


def controls_of(manifest: Mapping[str, Any]) -> Controls | None:
    """Return the controls of the last operation of a manifest, None where it has none."""
    record = manifest["operations"][-1].get("record") or {}
    controls = record.get("controls") or {}
    names = [name for name in CONTROLS if name in controls]
    if not names:
        return None
    metrics = [name for name in METRICS if name in controls[names[0]]]
    of_result = {name: manifest["metrics"][name]["after"]["value"] for name in metrics}
    rows = [("result", f"{controls['entries']:,}", *(format_number(of_result[name]) for name in metrics))]
    for name in names:
        found = controls[name]
        size = f"{found['entries']:,}" if "entries" in found else f"keep {format_number(found['keep'])}"
        rows.append((name, size, *(format_number(found[metric]) for metric in metrics)))
    title = f"controls of the same size ({controls['removed']:.1%} of the fine-tuning removed)"
    return Controls(("", "entries", *metrics), tuple(rows), title)
