"""`llmsurgery unlearn`."""

from __future__ import annotations

from llmsurgery.cli.operation import Common, operation


@operation
def unlearn(common: Common) -> None:
    """Make a model forget.

    Example: llmsurgery unlearn MODEL --method flat --forget forget.jsonl -o OUT
    """
    from llmsurgery import api

    common.run(api.unlearn)
