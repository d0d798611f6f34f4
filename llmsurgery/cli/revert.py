"""`llmsurgery revert`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from llmsurgery.cli import options
from llmsurgery.cli.output import Output


def revert(
    result: Annotated[str, typer.Argument(metavar="OUT", help="output directory of an operation or of apply")],
    out: Annotated[str, typer.Option("-o", "--out", metavar="BASE", help="directory for the source")],
    link: options.Link = False,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Undo an operation: give its source back, bit for bit.

    Example: llmsurgery revert OUT -o BASE
    """
    from llmsurgery import api

    output = Output(as_json, quiet, verbose)
    document = cast(dict[str, Any], api.revert(result, out=out, link=link, force=force, progress=output))
    output.document(document)
    output.show(f"restored {document['tensors']} tensors and {len(document['files'])} side files", f"checkpoint: {out}")
    output.essential(out)
