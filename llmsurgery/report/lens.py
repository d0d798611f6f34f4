"""What a model would say after every layer, as a table and as a heat map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from llmsurgery.report.heat import plain, save_figure, shaded

_WIDEST = 12


def lens_table(document: Mapping[str, Any], positions: int) -> Table:
    """Return the last tokens of a prompt as columns and the layers as rows, likelier tokens on darker ground.

    Args:
        document: What `llmsurgery.api.lens` returns.
        positions: How many of the last tokens are shown; 0 for all.
    """
    first = max(0, len(document["tokens"]) - positions) if positions else 0
    followed = document.get("token")
    what = f"p and rank of {followed['text']!r}" if followed else "first token and its p"
    table = Table(title=f"{document['site']}: {what} after each layer", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for token in document["tokens"][first:]:
        table.add_column(Text(_short(token)), no_wrap=True)
    for reading in document["readings"]:
        table.add_row(reading["layer"], *(_cell(position, bool(followed)) for position in reading["positions"][first:]))
    return table


def _cell(position: Mapping[str, Any], followed: bool) -> Text:
    if followed:
        return shaded(f"{position['p']:.3f} {position['rank']}", position["p"])
    best = position["top"][0]
    return shaded(f"{_short(best['text'])} {best['p']:.2f}", best["p"])


def _short(text: str) -> str:
    shown = repr(text)[1:-1]
    return shown if len(shown) <= _WIDEST else f"{shown[: _WIDEST - 1]}\u2026"


def save_lens(document: Mapping[str, Any], path: str) -> None:
    """Draw layers against tokens: the probability of the followed token, else of each first token with its text.

    Raises:
        ResourceError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    followed = document.get("token")
    readings, tokens = document["readings"], document["tokens"]
    values = [
        [position["p"] if followed else position["top"][0]["p"] for position in reading["positions"]]
        for reading in readings
    ]
    figure = Figure(figsize=(2 + 0.9 * len(tokens), 1.6 + 0.28 * len(readings)), layout="constrained")
    axes = figure.add_subplot()
    # The first layer at the bottom, as the stream runs upwards in drawings of transformers.
    image = axes.imshow(values, aspect="auto", cmap="Purples", vmin=0, vmax=1, origin="lower")
    for row, reading in enumerate(readings):
        for column, position in enumerate(reading["positions"]):
            label = str(position["rank"]) if followed else _short(position["top"][0]["text"])
            color = "white" if values[row][column] > 0.6 else "black"
            axes.text(column, row, plain(label), ha="center", va="center", fontsize=6, color=color)
    axes.set_xticks(range(len(tokens)), [plain(_short(token)) for token in tokens], rotation=45, ha="right")
    axes.set_yticks(range(len(readings)), [reading["layer"] for reading in readings])
    axes.set_ylabel("layer")
    what = f"p and rank of {followed['text']!r}" if followed else "first token"
    axes.set_title(plain(f"{document['site']}: {what} after each layer"))
    figure.colorbar(image, ax=axes, label="p")
    save_figure(figure, path)
