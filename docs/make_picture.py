"""Draw what `llmsurgery unlearn --method flat` prints in a terminal, from a real run, as docs/demo.svg.

python docs/make_picture.py

The run happens in a folder that is removed. The line with seconds and memory is left out, since it says something of
the machine alone; the rest is the same from run to run on one machine. The picture names no font and no address to load
one from.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from llmsurgery.cli import output
from llmsurgery.cli.app import run

COMMAND = ("unlearn", "--method", "flat")
PICTURE = Path(__file__).with_name("demo.svg")
WIDTH = 118
"""Columns of the terminal."""


class Screen(Console):
    """A terminal that takes everything down but the line with seconds and memory."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, unless it is that line."""
        if not re.match(r"[0-9.]+ s, peak memory", str(objects[0])):
            super().print(*objects, **options)


def draw(words: tuple[str, ...]) -> str:
    """Run a command and return what it prints as an SVG picture.

    Args:
        words: The words after `llmsurgery`.

    Raises:
        SystemExit: The command failed.
    """
    console = Screen(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(f"$ llmsurgery {' '.join(words)}", markup=False)
    # One console takes everything down; the notes on standard error follow, as in a terminal.
    output.Output._console = lambda self, stderr=False: console  # type: ignore[method-assign]
    notes = io.StringIO()
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(notes):
        os.chdir(folder)
        try:
            code = run(words)
        finally:
            os.chdir(here)
    if code:
        raise SystemExit(f"exit code {code}\n{notes.getvalue()}")
    console.print(notes.getvalue().rstrip(), markup=False)
    return without_fonts(console.export_svg(title="llmsurgery", unique_id="demo"))


def without_fonts(picture: str) -> str:
    """Return an SVG picture of rich without the fonts that it would load from the network."""
    picture = re.sub(r"@font-face \{.*?\}\n?", "", picture, flags=re.DOTALL)
    picture = re.sub(r"font-family: Fira Code, monospace", "font-family: monospace", picture)
    return "\n".join(line.rstrip() for line in picture.splitlines()) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(COMMAND), encoding="utf-8", newline="\n")
