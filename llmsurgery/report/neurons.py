"""Decoded neurons as a table and as a map of tokens and layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from llmsurgery.report.heat import plain, save_figure, shaded, visible


def neuron_name(neuron: Mapping[str, Any]) -> str:
    """Return the address of a neuron: layer:number, with the expert or `shared` where the block has several MLPs."""
    where = {"mlp": "", "shared": " shared"}.get(neuron["part"], f" expert {neuron['expert']}")
    return f"{neuron['layer']}:{neuron['neuron']}{where}"


def neuron_table(document: Mapping[str, Any]) -> Table:
    """Return the listed neurons, strongest first."""
    found = f"; {document['find']!r} among the first tokens of {document['found']}" if document["find"] else ""
    decoded = sum(document["decoded"].values())
    table = Table(title=f"{decoded:,} vectors decoded{found}", title_justify="left")
    for name, justify in (("neuron", "left"), ("side", "left"), ("z", "right"), ("margin", "right"), ("p", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=True)
    table.add_column("first tokens")
    both = len(document["sides"]) > 1
    if both:
        table.add_column("reads what it writes", no_wrap=True)
    for neuron in document["neurons"]:
        table.add_row(
            neuron_name(neuron),
            neuron["side"],
            f"{neuron['z']:.2f}",
            f"{neuron['margin']:.3g}",
            f"{neuron['p']:.2g}",
            visible(" ".join(repr(token["text"]) for token in neuron["tokens"])),
            *(["yes" if neuron["sides_agree"] else ""] if both else []),
        )
    return table


def map_table(document: Mapping[str, Any]) -> Table:
    """Return the largest z of each token in each layer, stronger ones on darker ground."""
    chart = document["map"]
    table = Table(title="largest z per layer; layers without are left out", title_justify="left")
    table.add_column("token", no_wrap=True)
    # A deep model has more layers than a terminal has columns.
    filled = [number for number in range(len(chart["layers"])) if any(row[number] for row in chart["z"])]
    for number in filled:
        table.add_column(str(chart["layers"][number]), justify="right", no_wrap=True)
    top = max((max(row) for row in chart["z"]), default=0.0) or 1.0
    for token, row in zip(chart["tokens"], chart["z"], strict=True):
        cells = (shaded(f"{row[number]:.1f}" if row[number] else "", row[number] / top) for number in filled)
        table.add_row(visible(repr(token)), *cells)
    return table


def save_neurons(document: Mapping[str, Any], path: str) -> None:
    """Draw the map of tokens and layers.

    Raises:
        ResourceError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    chart = document["map"]
    figure = Figure(figsize=(3 + 0.3 * len(chart["layers"]), 1.6 + 0.26 * len(chart["tokens"])), layout="constrained")
    axes = figure.add_subplot()
    rows = chart["z"] or [[0.0] * len(chart["layers"])]
    image = axes.imshow(rows, aspect="auto", cmap="Purples", vmin=0, vmax=max(map(max, rows)) or 1)
    axes.set_yticks(range(len(chart["tokens"])), [plain(repr(token)) for token in chart["tokens"]])
    axes.set_xticks(range(len(chart["layers"])), [str(layer) for layer in chart["layers"]], fontsize="small")
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label="largest z")
    what = f"neurons for {document['find']!r}" if document["find"] else "strongest named neurons"
    axes.set_title(plain(f"{what} (side {', '.join(document['sides'])})"))
    save_figure(figure, path)
