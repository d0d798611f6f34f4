"""`llmsurgery apply`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from llmsurgery.cli import options
from llmsurgery.cli.output import Output


def apply(
    patch: Annotated[str, typer.Argument(help="patch file, or the directory of a --save patch run")],
    base: Annotated[str, typer.Argument(help="the checkpoint that the patch was made for")],
    out: options.NewOut,
    link: options.Link = False,
    force: options.Force = False,
    no_undo: options.NoUndo = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Apply a patch to its base; the result is checked byte for byte.

    Example: llmsurgery apply edit.patch MODEL -o OUT
    """
    from llmsurgery import api
    from llmsurgery.report.table import coverage_table

    output = Output(as_json, quiet, verbose)
    manifest = cast(
        dict[str, Any],
        api.apply(patch, base, out=out, link=link, force=force, undo=not no_undo, progress=output),
    )
    output.document(manifest)
    undo = manifest["cost"]["undo_bytes"]
    output.show(coverage_table(manifest["coverage"]))
    if undo is not None:
        output.show(f"undo data: {undo:,} bytes; `llmsurgery revert {out} -o BASE` gives the base back")
    output.show(f"checkpoint: {out}")
    output.essential(out)
