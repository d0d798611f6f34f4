"""`llmsurgery lens`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from llmsurgery.cli import options
from llmsurgery.cli.output import Output

Prompt = Annotated[str, typer.Argument(help="text that the model goes on from")]
Token = Annotated[
    str | None, typer.Option("--token", metavar="WORD", help="follow the first token of this word: p and rank")
]
Top = Annotated[int, typer.Option("--top", min=1, help="first tokens of each reading under --json")]
Site = Annotated[
    str, typer.Option("--site", help="block: the residual after it; attention, mlp: what they add; middle: in between")
]
Last = Annotated[int, typer.Option("--last", min=0, help="tokens of the prompt in the table; 0: all")]
Picture = Annotated[str | None, typer.Option("--picture", help="also draw the map: a .png, .svg or .pdf file")]


def lens(
    model: options.OneModel,
    prompt: Prompt,
    token: Token = None,
    top: Top = 5,
    site: Site = "block",
    last: Last = 8,
    picture: Picture = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what a model would say after every layer, by its own final norm and head (logit lens).

    Example: llmsurgery lens MODEL "The Eiffel Tower is in" --token Paris
    """
    from llmsurgery import api
    from llmsurgery.report.lens import lens_table

    output = Output(as_json, quiet, verbose)
    document = cast(
        dict[str, Any],
        api.lens(
            model,
            prompt,
            token=token,
            top=top,
            site=site,
            picture=picture,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        ),
    )
    output.document(document)
    output.show(
        lens_table(document, last),
        "early layers do not share the head's basis: what the lens does not show may be there all the same",
    )
    final = document["readings"][-1]["positions"][-1]
    output.essential(f"{final['p']:.6f} {final['rank']}" if token is not None else final["top"][0]["text"].strip())
