"""Causal traces as heat maps: tables for the terminal and pictures for a file; and what other maps share with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from llmsurgery.errors import ResourceError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = (".png", ".svg", ".pdf")


def effect_rows(document: Mapping[str, Any], kind: str) -> list[tuple[str, Sequence[float]]]:
    """Return label and effects per layer: one row per token of a single prompt, else per group of tokens."""
    if "effects" in document:
        marked = [token["text"] + ("*" if "subject" in (token["group"] or "") else "") for token in document["tokens"]]
        return list(zip(marked, document["effects"][kind], strict=True))
    return list(document["groups"][kind].items())


def heat_table(document: Mapping[str, Any], kind: str) -> Table:
    """Return one kind of a trace as a table, stronger effects on darker ground."""
    rows = effect_rows(document, kind)
    wide = "" if kind == "block" else f", window {document['window']}"
    table = Table(title=f"{kind}: indirect effect per layer{wide}", title_justify="left")
    table.add_column("token", no_wrap=True)
    for layer in range(document["layers"]):
        table.add_column(str(layer), justify="right")
    top = max(max(abs(value) for value in values) for _, values in rows) or 1.0
    for label, values in rows:
        table.add_row(Text(repr(label)[1:-1]), *(shaded(f"{value:.3f}", value / top) for value in values))
    return table


def shaded(text: str, share: float) -> Text:
    """Return a cell on ground that is the darker the larger its share of the largest value."""
    share = max(0.0, min(1.0, share))
    light = round(255 * (1 - 0.75 * share))
    return Text(text, style=f"{'white' if share > 0.6 else 'black'} on rgb({light},{light},255)")


def visible(text: str) -> Text:
    """Return a text as it stands; rich would take brackets in it for markup."""
    return Text(text)


def plain(text: str) -> str:
    """Return a text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def check_picture(path: str) -> None:
    """Refuse a picture that could not be written, before any work.

    Raises:
        UsageError: An unknown ending, or the file exists or has no folder.
        UnsupportedError: matplotlib is not installed.
    """
    place = Path(path)
    if place.suffix.lower() not in PICTURES:
        raise UsageError(f"{path} has no known ending", f"pictures are {', '.join(PICTURES)}", "--picture trace.png")
    if place.exists():
        raise UsageError(f"{path} exists", "a picture is never overwritten", "give --picture another name")
    if not place.parent.is_dir():
        raise UsageError(f"the folder of {path} does not exist", "the picture has no place", "make the folder first")
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise UnsupportedError(
            "pictures need matplotlib", "it is not installed", "pip install 'llmsurgery-toolkit[pictures]'"
        ) from error


def save_picture(document: Mapping[str, Any], path: str) -> None:
    """Draw a trace, one panel per kind.

    Raises:
        ResourceError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    kinds = list(document["groups"])
    height = 1.6 + 0.22 * len(effect_rows(document, kinds[0]))
    figure = Figure(figsize=(1.5 + 3.6 * len(kinds), height), layout="constrained")
    top = max(max(values) for kind in kinds for _, values in effect_rows(document, kind))
    for number, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), number + 1)
        rows = effect_rows(document, kind)
        image = axes.imshow([list(values) for _, values in rows], aspect="auto", cmap="Purples", vmin=0, vmax=top or 1)
        axes.set_title(kind if kind == "block" else f"{kind}, window {document['window']}")
        axes.set_xlabel("layer")
        axes.set_yticks(range(len(rows)), [repr(label)[1:-1] for label, _ in rows] if number == 0 else [""] * len(rows))
        figure.colorbar(image, ax=axes)
    noise = document["noise"]
    figure.suptitle(
        f"p {document['clean']:.3f}, with noise of {noise['multiplier']:g} sigma {document['corrupted']:.3f}: "
        "part of the answer's probability that comes back"
    )
    save_figure(figure, path)


def save_figure(figure: Figure, path: str) -> None:
    """Write a picture.

    Raises:
        ResourceError: The file cannot be written.
    """
    try:
        # Without a date the same figures give the same bytes.
        figure.savefig(path, metadata={"Date": None} if path.lower().endswith(".svg") else None)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written", str(error), "choose another place for --picture") from error
