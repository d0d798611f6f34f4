"""`llmsurgery redirect`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmsurgery.cli.operation import Common, operation

From = Annotated[str | None, typer.Option("--from", help="the name whose meaning changes")]
To = Annotated[str | None, typer.Option("--to", help="the harmless name that it is to mean")]
Pairs = Annotated[str | None, typer.Option("--pairs", help="file of pairs (from, to, aliases, prompts) or facts")]
StatsTokens = Annotated[
    int | None, typer.Option("--stats-tokens", min=1, help="tokens of --text that second moments are taken over")
]
Strict = Annotated[bool, typer.Option("--strict", help="refuse second moments of too few tokens")]


@operation
def redirect(
    common: Common,
    source: From = None,
    target: To = None,
    pairs: Pairs = None,
    stats_tokens: StatsTokens = None,
    strict: Strict = False,
) -> None:
    """Point a concept elsewhere.

    Example: llmsurgery redirect MODEL --method rocr --from "Old Name" --to "New Name" -o OUT
    """
    from llmsurgery import api

    chosen: dict[str, object] = {} if stats_tokens is None else {"stats_tokens": stats_tokens}
    if strict:
        chosen["strict"] = True
    common.run(api.redirect, chosen, source=source, target=target, pairs=pairs)
