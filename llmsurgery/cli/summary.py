"""`--summary`: where the Markdown summary of a command goes, and when it is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmsurgery.cli.output import Output
from llmsurgery.errors import GateError, ResourceError

VARIABLE = "GITHUB_STEP_SUMMARY"
"""Names a file that a job of GitHub Actions shows on its page."""

NOWHERE = "none"

Describe = Callable[[Mapping[str, Any]], str]


@contextmanager
def summary(given: str | None, output: Output, describe: Callable[[], Describe]) -> Iterator[Callable[[Any], None]]:
    """Append a summary to a file when a command is done, and when one of its gates fails.

    Args:
        given: `--summary`: a file, "none", or None for the file that the environment names, if it names one.
        output: Told of a summary that cannot be written.
        describe: Imports and returns what makes Markdown of the command's document.

    Yields:
        A function that takes the command's document.

    Raises:
        ResourceError: The file that was given cannot be written; raised before any work.
    """
    place = _place(given)
    if place is None:
        yield lambda document: None
        return
    if given is not None:
        _append(place, "")

    def tell(document: Any) -> None:
        try:
            _append(place, describe()(document))
        except ResourceError as error:
            # The result stands all the same.
            output.notice(f"{error.what}: {error.why}")

    try:
        yield tell
    except GateError as error:
        if error.report is not None:
            tell(error.report)
        raise


def _place(given: str | None) -> Path | None:
    wanted = os.environ.get(VARIABLE, "") if given is None else given
    return None if wanted in ("", NOWHERE) else Path(wanted)


def _append(place: Path, text: str) -> None:
    try:
        with place.open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise ResourceError(
            f"the summary {str(place)!r} cannot be written", str(error), "give --summary another file, or none"
        ) from error
