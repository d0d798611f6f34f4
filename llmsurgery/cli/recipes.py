"""`llmsurgery recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmsurgery.cli import options
from llmsurgery.cli.output import Output


def recipes(
    name: Annotated[str | None, typer.Argument(help="show or copy this one", show_default=False)] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="write it to this file")] = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """List the built-in recipes, show one, or copy it to a file.

    Example: llmsurgery recipes unlearn-demo -o nightly.yaml
    """
    from llmsurgery import api
    from llmsurgery.report.table import rows_table

    output = Output(as_json, quiet, verbose)
    document = api.recipes(name, out=out, force=force)
    output.document(document)
    if isinstance(document, list):
        output.show(rows_table(("recipe", "what it does"), [(row["name"], row["summary"]) for row in document]))
        for row in document:
            output.essential(row["name"])
    elif out is None:
        output.show(document["text"].rstrip())
        output.essential(document["name"])
    else:
        output.show(f"recipe: {Path(out)}; run it with `llmsurgery run {out}`")
        output.essential(out)
