"""What a run leaves for people to read: the model card, and a report where one is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmsurgery.checkpoint.oserrors import writing
from llmsurgery.run.manifest import encode_manifest
from llmsurgery.run.places import page_path, report_path

REPORT = "report.html"
"""Name of the report inside an output."""

WriteCard = Callable[[Mapping[str, object], str], str]
"""Takes the manifest and the source's card, returns the new card."""


@dataclass(frozen=True)
class Example:
    """A forget question with the answers before and after; for the screen, and for a report that is asked for."""

    question: str
    reference: str
    before: str
    after: str


Examples = Mapping[str, Sequence[Example]]
"""Name of a step -> its examples; the name of a single operation is empty."""

WriteReport = Callable[[Mapping[str, object], Examples], str]
"""Takes the manifest and examples, returns a page of HTML."""


def leave_report(out: Path, manifest: dict[str, object], page: str | None) -> Path:
    """Leave the manifest of a failed gate beside the output, and a page if there is one.

    Args:
        out: The output that was not published.
        manifest: What was measured.
        page: The report as HTML; None removes one of an earlier run.

    Returns:
        Where the manifest lies.

    Raises:
        ResourceError: It cannot be written.
    """
    report = report_path(out)
    _replace(report, encode_manifest(manifest))
    if page is None:
        page_path(out).unlink(missing_ok=True)
    else:
        _replace(page_path(out), page.encode())
    return report


def remove_reports(out: Path) -> None:
    """Remove what an earlier failure left: it would contradict the result that now stands beside it."""
    report_path(out).unlink(missing_ok=True)
    page_path(out).unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(path):
        temporary.write_bytes(content)
        temporary.replace(path)
