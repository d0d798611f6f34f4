"""`llmsurgery prune`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmsurgery.cli.operation import Common, operation

Sparsity = Annotated[float | None, typer.Option("--sparsity", help="share that is zeroed or removed; default 0.5")]
Pattern = Annotated[
    str | None, typer.Option("--pattern", metavar="N:M", help="zero N of every M consecutive inputs, such as 2:4")
]
Of = Annotated[
    str | None, typer.Option("--of", metavar="prunable|all", help="what --sparsity is a share of; default prunable")
]
Hidden = Annotated[int | None, typer.Option("--hidden", metavar="K", help="width that is kept, where a method narrows")]
Teacher = Annotated[
    bool, typer.Option("--teacher", help="distil from the source while training, for methods that train")
]
Layers = Annotated[
    int | None, typer.Option("--layers", metavar="N", help="blocks that are kept, for methods that remove blocks")
]
Calibration = Annotated[
    str | None, typer.Option("--calibration", help="ordinary text for activations; default: a shipped text")
]
Domain = Annotated[
    str | None, typer.Option("--domain", help="rows of the domain to stay good at; the last fifth is only measured")
]


@operation
def prune(
    common: Common,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    of: Of = None,
    hidden: Hidden = None,
    layers: Layers = None,
    teacher: Teacher = False,
    calibration: Calibration = None,
    domain: Domain = None,
) -> None:
    """Make a model sparser or smaller.

    Example: llmsurgery prune MODEL --method wanda --sparsity 0.5 --calibration text.jsonl -o OUT
    """
    from llmsurgery import api

    common.run(
        api.prune,
        sparsity=sparsity,
        pattern=pattern,
        of=of,
        hidden=hidden,
        layers=layers,
        teacher=teacher,
        calibration=calibration,
        domain=domain,
    )
