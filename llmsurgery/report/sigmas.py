"""The constants of all norms over the steps of a removal, as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmsurgery.report.heat import save_figure

PLACE = Path(".llmsurgery") / "layernorm.json"
"""File of a result that holds the constants at every step."""

TITLES = {
    "norm.mlp": "before the MLP",
    "norm.attn": "before attention",
    "norm.final": "last norm",
}


def save_sigmas(out: Path, path: str) -> None:
    """Draw the constants of a result, one panel per kind of norm; a dot marks the step at which a norm went.

    Args:
        out: Directory of the result.
        path: PNG, SVG or PDF file.

    Raises:
        ResourceError: The file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    document = json.loads((out / PLACE).read_text("utf-8"))
    names, values = document["history"]["norms"], document["history"]["sigma"]
    roles = list(dict.fromkeys(name.split()[0] for name in names))
    figure = Figure(figsize=(1 + 3.8 * len(roles), 3.6), layout="constrained")
    gone = _gone(document["events"])
    for number, role in enumerate(roles):
        axes = figure.add_subplot(1, len(roles), number + 1)
        members = [place for place, name in enumerate(names) if name.split()[0] == role]
        for order, place in enumerate(members):
            series = [row[place] for row in values]
            colour = colormaps["viridis"](0.9 * order / max(1, len(members) - 1))
            block = names[place].removeprefix(role).strip()
            axes.plot(series, color=colour, linewidth=1.2, label=f"block {block}" if block else None)
            for step in gone.get((role, int(block) if block else None), []):
                axes.plot([step], [series[min(step, len(series) - 1)]], "o", color=colour, markersize=4)
        axes.set_yscale("log")
        axes.set_title(TITLES.get(role, role))
        axes.set_xlabel("step")
        axes.set_ylabel("sigma" if number == 0 else "")
        if 1 < len(members) <= 8:
            axes.legend(fontsize=7)
    figure.suptitle("constant of every norm; a dot marks where it was locked and took the norm's place")
    save_figure(figure, path)


def _gone(events: list[dict[str, Any]]) -> dict[tuple[str, int | None], list[int]]:
    """Return the steps at which the norms of a role and block went; before attention twice, q and k first."""
    roles = {"mlp": ("norm.mlp", "norm.mlp_post"), "qk": ("norm.attn", "norm.q", "norm.k"), "v": ("norm.attn",),
             "final": ("norm.final",)}  # fmt: skip
    found: dict[tuple[str, int | None], list[int]] = {}
    for event in events:
        for role in roles.get(event["norm"], ()):
            found.setdefault((role, event["block"]), []).append(event["step"])
    return found
