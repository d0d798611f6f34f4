"""The gap along the refusal direction, layer by layer, of parent, child and result: as a table and as a picture.

The parent is the aligned model, whose own gap is 1 after every block; the child is the source of a repair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from llmsurgery.report.heat import save_figure
from llmsurgery.report.table import rows_table

GAP = "safety.direction_gap"
MODELS = {"aligned": "parent", "before": "child", "after": "result"}
"""Sides of a metric in a manifest -> what they are called here."""


def gap_details(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return name of the model -> what was measured after every block; empty where it was not."""
    metric = manifest["metrics"].get(GAP, {})
    found = {name: metric[side].get("detail") for side, name in MODELS.items() if side in metric}
    return {name: detail for name, detail in found.items() if detail}


def gap_table(manifest: Mapping[str, Any]) -> Table | None:
    """Return one row per block: the share of the parent's gap, and how well it tells the prompts apart."""
    details = gap_details(manifest)
    if not {"child", "result"} <= details.keys():
        return None
    child, result = details["child"], details["result"]
    head = ("block", "child gap", "result gap", "child cosine", "result cosine", "child AUROC", "result AUROC")
    names = ("share", "cosine", "auroc")
    rows = [
        (f"{block}{'*' if block == child['block'] else ''}",
         *(f"{side[name][block]:.3f}" for name in names for side in (child, result)))
        for block in range(len(child["share"]))
    ]  # fmt: skip
    return rows_table(head, rows, f"refusal direction after every block, parent = 1 (*: {GAP})")


def save_gap(manifest: Mapping[str, Any], path: str) -> None:
    """Draw shares and cosines after every block.

    Args:
        manifest: The manifest of a repair for which the gap was measured.
        path: Picture file.

    Raises:
        ResourceError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    details = gap_details(manifest)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for number, (name, title) in enumerate((("share", "gap, parent = 1"), ("cosine", "cosine with the parent's"))):
        axes = figure.add_subplot(1, 2, number + 1)
        for model, style in zip(details, ("k--", "o-", "s-"), strict=False):
            axes.plot(details[model][name], style, label=model, markersize=3)
        axes.axvline(details["child"]["block"], color="gray", linewidth=0.8)
        axes.set_title(title)
        axes.set_xlabel("block")
    axes.legend()
    figure.suptitle("refusal direction at the last token of the prompts")
    save_figure(figure, path)
