"""`llmsurgery stack`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from llmsurgery.cli import options
from llmsurgery.cli.output import Output

Patches = Annotated[
    list[str], typer.Argument(metavar="PATCH...", help="patch files, or directories of --save patch runs, in order")
]
Base = Annotated[str, typer.Option("--base", help="the checkpoint that all patches were made for")]
StackOut = Annotated[
    str | None, typer.Option("-o", "--out", help="output directory or, with --save patch, file; none: only check")
]
StackSave = Annotated[str, typer.Option("--save", help="what to write: full checkpoint, or one patch file")]
AllowOverlap = Annotated[
    bool, typer.Option("--allow-overlap", help="let a later patch overwrite what an earlier one made of a tensor")
]


def stack(
    patches: Patches,
    base: Base,
    out: StackOut = None,
    save: StackSave = "full",
    allow_overlap: AllowOverlap = False,
    link: options.Link = False,
    force: options.Force = False,
    no_undo: options.NoUndo = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Put several patches for one base together, as a checkpoint or as one patch; conflicts are named per tensor.

    Example: llmsurgery stack a.patch b.patch --base MODEL -o OUT
    """
    from llmsurgery import api
    from llmsurgery.report.table import coverage_table, rows_table

    output = Output(as_json, quiet, verbose)
    document = cast(
        dict[str, Any],
        api.stack(
            patches,
            base,
            out=out,
            save=save,
            allow_overlap=allow_overlap,
            link=link,
            force=force,
            undo=not no_undo,
            progress=output,
        ),
    )
    output.document(document)
    if overlaps := document["overlaps"]:
        rows = [(one["name"], one["kind"], *(patches[one[place]] for place in ("first", "second"))) for one in overlaps]
        output.show(rows_table(("changed twice", "how they meet", "first", "second"), rows))
    else:
        output.show("no two patches change the same tensor or file")
    if "coverage" in document:
        output.show(coverage_table(document["coverage"]), f"checkpoint: {out}")
        output.essential(str(out))
    elif "patch" in document:
        output.show(f"patch: {out}, {document['patch']['bytes']:,} bytes for {document['patch']['tensors']} tensors")
        output.essential(str(out))
    else:
        output.show("nothing was written: no -o")
        output.essential(f"{len(overlaps)} overlaps, no conflict")
