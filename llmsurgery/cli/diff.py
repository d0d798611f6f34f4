"""`llmsurgery diff`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from llmsurgery.cli import options
from llmsurgery.cli.output import Output


def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="the first checkpoint")],
    after: Annotated[str, typer.Argument(metavar="B", help="the second checkpoint")],
    out: options.PatchOut = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what changed between two checkpoints, per role and per tensor; optionally write it as a patch.

    Example: llmsurgery diff MODEL OUT -o edit.patch
    """
    from llmsurgery import api
    from llmsurgery.report.table import rows_table

    output = Output(as_json, quiet, verbose)
    document = cast(dict[str, Any], api.diff(before, after, out=out, force=force, progress=output))
    output.document(document)
    roles = [
        (role, row["tensors"], row["tensors_changed"], row["entries_changed"], _norm(row["norm_change"]))
        for role, row in document["roles"].items()
        if row["tensors_changed"]
    ]
    tensors = [
        (name, row["role"], row["entries"], row["entries_changed"], _norm(row["norm_change"]))
        for name, row in document["tensors"].items()
    ]
    if document["identical"]:
        output.show("no difference")
    if tensors:
        output.show(
            rows_table(("role", "tensors", "changed", "entries changed", "relative norm"), roles),
            rows_table(("tensor", "role", "entries", "changed", "relative norm"), tensors),
        )
    lists = {f"files {kind}": names for kind, names in document["files"].items()}
    for title in ("only_before", "only_after", "reshaped"):
        lists[f"tensors {title.replace('_', ' ')}"] = document[title]
    for title, names in lists.items():
        if names:
            output.show(f"{title}: {', '.join(names)}")
    if patch := document["patch"]:
        output.show(f"patch: {patch['path']}, {patch['bytes']:,} bytes for {patch['tensors']} tensors")
        output.essential(patch["path"])
    else:
        moved = sum(len(document[title]) for title in ("only_before", "only_after", "reshaped"))
        output.essential("identical" if document["identical"] else f"{len(tensors) + moved} tensors changed")


def _norm(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"
