"""What every operation of the Python API takes, and how it is carried out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypedDict

from llmsurgery.run.request import Request

if TYPE_CHECKING:
    from llmsurgery.compute.progress import Progress
    from llmsurgery.run.execute import Outcome

File = str | PathLike[str]
"""A path, or a hub id."""


def operate(request: Request, progress: Progress | None = None) -> Outcome:
    """Run one operation.

    Args:
        request: What is asked for.
        progress: Told of long work and notices; silent by default.

    Returns:
        The manifest, the output directory and examples of answers.

    Raises:
        SurgeryError: See `llmsurgery.errors`; the source and earlier outputs are untouched.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.card import write_card
    from llmsurgery.report.page import write_report
    from llmsurgery.run.execute import execute
    from llmsurgery.run.push import check_push

    told = progress or Silent()
    if request.push is not None:
        check_push(request.push)
    return uploaded(execute(request, told, write_card, write_report), request.push, told)


def uploaded(outcome: Outcome, repository: str | None, progress: Progress) -> Outcome:
    """Upload a result where a repository was given, and return it."""
    from llmsurgery.run.push import push_result

    if repository is not None and outcome.out is not None:
        push_result(outcome.out, repository, progress)
    return outcome


def given_files(**files: File | None) -> dict[str, str]:
    """Return the files that are given, by name."""
    return {name: fspath(path) for name, path in files.items() if path is not None}


class Options(TypedDict, total=False):
    """What every operation takes beside what it is about; see `unlearn`."""

    forget: File | None
    retain: File | None
    holdout: File | None
    retain_model: File | None
    authors: File | None
    facts: File | None
    text: File | None
    out: File | None
    settings: Mapping[str, object] | None
    seed: int
    device: str
    dtype: str
    quantize: str
    batch_size: int | str | None
    dry_run: bool
    require: Sequence[str]
    until: str | None
    guard: str | None
    link: bool
    force: bool
    resume: bool
    save: str
    undo: bool
    keep_partial: bool
    trust_remote_code: bool
    report: bool
    report_examples: int
    push: str | None
    progress: Progress | None


_DATA = ("forget", "retain", "holdout", "authors", "facts", "text")
_PATHS = ("retain_model", "out")


def make_request(task: str, method: str, model: File | None, options: Options, /, **data: File | None) -> Request:
    """Return the request of an operation; `data` are the files that only this task has."""
    given: dict[str, Any] = {name: value for name, value in options.items() if name != "progress"}
    files = given_files(**{name: given.pop(name, None) for name in _DATA}, **data)
    for name in _PATHS:
        given[name] = None if given.get(name) is None else fspath(given[name])
    given["settings"] = dict(given.get("settings") or {})
    given["require"] = tuple(given.get("require", ()))
    return Request(task=task, method=method, model=None if model is None else fspath(model), data=files, **given)
