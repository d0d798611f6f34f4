"""Where a result goes, and what is left beside it when a gate fails."""

from __future__ import annotations

from pathlib import Path

from llmsurgery.errors import UsageError
from llmsurgery.run.request import Request


def generated_name(request: Request) -> Path:
    """Return a free name below `llmsurgery-out`: task and method, then -002, -003, ...

    With `resume` it is the first name that an interrupted run left unfinished, if there is one.
    """
    folder = Path("llmsurgery-out")
    stem = f"{request.task}-{request.method}"
    unfinished: Path | None = None
    number = 1
    while True:
        place = folder / (stem if number == 1 else f"{stem}-{number:03d}")
        partial = place.with_name(f"{place.name}.partial")
        taken = (place, partial, place.with_name(f"{place.name}.report.json"))
        if not any(path.exists() or path.is_symlink() for path in taken):
            return unfinished if request.resume and unfinished is not None else place
        if unfinished is None and partial.is_dir() and not place.exists():
            unfinished = place
        number += 1


def report_path(out: Path) -> Path:
    """Return where the manifest of a failed gate is left."""
    return out.with_name(out.name + ".report.json")


def page_path(out: Path) -> Path:
    """Return where the page of a failed gate is left."""
    return out.with_name(out.name + ".report.html")


def check_report(out: Path, force: bool) -> None:
    """Refuse to replace a report that is there already.

    Raises:
        UsageError: There is one, and no --force.
    """
    for report in (report_path(out), page_path(out)):
        if not force and report.exists():
            raise UsageError(
                f"{str(report)!r} exists",
                "it is where the report would go if a gate failed",
                "remove it, choose another output with -o, or give --force",
            )
