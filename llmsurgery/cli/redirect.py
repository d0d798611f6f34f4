"""`llmsurgery redirect`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmsurgery.cli.operation import Common, operation

From = Annotated[str | None, typer.Option("--from", help="the name whose meaning changes")]
To = Annotated[str | None, typer.Option("--to", help="the harmless name that it is to mean")]
Pairs = Annotated[str | None, typer.Option("--pairs", help="file of pairs (from, to, aliases, prompts) or facts")]


@operation
def redirect(common: Common, source: From = None, target: To = None, pairs: Pairs = None) -> None:
    """Point a concept elsewhere.

    Example: llmsurgery redirect MODEL --method rocr --from "Old Name" --to "New Name" -o OUT
    """
    from llmsurgery import api

    common.run(api.redirect, source=source, target=target, pairs=pairs)
