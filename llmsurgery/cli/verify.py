"""`llmsurgery verify`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from llmsurgery.cli import options
from llmsurgery.cli.output import Output


def verify(
    path: Annotated[str, typer.Argument(metavar="DIR", help="checkpoint directory")],
    base: Annotated[str | None, typer.Option("--base", help="the model it was made from, to compare with")] = None,
    trust_remote_code: options.RemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Check hashes, finite weights and that stock transformers loads it; any difference ends with exit code 8.

    Example: llmsurgery verify OUT --base MODEL
    """
    from llmsurgery import api

    output = Output(as_json, quiet, verbose)
    document = cast(dict[str, Any], api.verify(path, base=base, trust_remote_code=trust_remote_code, progress=output))
    output.document(document)
    for check in document["checks"]:
        output.show(f"{check['check']}: {check['detail']}")
    output.essential("ok")
