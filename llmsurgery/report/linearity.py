"""How linear one or two models are, as tables; and what a removal cost, beside the same training with all norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from llmsurgery.report.table import rows_table

LOSSES = {
    "source": "source",
    "at_once": "all norms off at once, untrained",
    "control": "trained as long with all norms",
    "result": "without norms",
}


def linearity_tables(document: Mapping[str, Any]) -> list[Table]:
    """Return the figures, the error of every norm and that of every component, one column per model."""
    models = document["models"]
    columns = list(models)
    tables = []
    for title, key in (
        ("figures", "figures"),
        ("departure from an affine map", "norms"),
        ("attribution", "components"),
    ):
        names = dict.fromkeys(name for model in models.values() for name in model[key])
        rows = [(name, *(f"{models[column][key].get(name, float('nan')):.3g}" for column in columns)) for name in names]
        tables.append(rows_table(("", *columns), rows, title))
    return tables


def losses_of(manifest: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    """Return name and loss of every model of a removal, None for other operations."""
    record = manifest["operations"][-1].get("record") or {}
    losses = record.get("losses")
    if not isinstance(losses, Mapping) or "result" not in losses:
        return None
    return [(label, f"{losses[name]:.4f}") for name, label in LOSSES.items() if name in losses]


def losses_title(manifest: Mapping[str, Any]) -> str:
    """Return what the losses were measured on."""
    windows = manifest["operations"][-1]["record"]["windows"]
    return f"cross-entropy on {windows['held']} windows of --corpus that no training saw, nats per token"
