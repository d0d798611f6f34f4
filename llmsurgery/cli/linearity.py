"""`llmsurgery linearity`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from llmsurgery.cli import options
from llmsurgery.cli.output import Output

Before = Annotated[
    str | None, typer.Option("--source", help="the model before its norms were removed, to compare with")
]
Plain = Annotated[str | None, typer.Option("--text", help="plain text to look at; default: a shipped corpus")]


def linearity(
    model: options.OneModel,
    source: Before = None,
    text: Plain = None,
    require: options.Require = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Check how linear the norms of a model are, and what direct logit attribution is worth in it.

    Example: llmsurgery linearity OUT --source gpt2 --require "linearity.norm_error<=1e-4"
    """
    from llmsurgery import api
    from llmsurgery.report.linearity import linearity_tables

    output = Output(as_json, quiet, verbose)
    document = cast(
        dict[str, Any],
        api.linearity(
            model,
            source=source,
            text=text,
            require=require or (),
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        ),
    )
    output.document(document)
    output.show(
        *linearity_tables(document),
        f"norm_error: 0 for an affine map, 0.5 for a norm; attribution over {document['tokens']} tokens, in fp64",
    )
    figures = document["models"]["model"]["figures"]
    output.essential(" ".join(f"{value:.3g}" for value in figures.values()))
