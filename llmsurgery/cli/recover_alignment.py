"""`llmsurgery recover-alignment`."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from llmsurgery.cli import options
from llmsurgery.cli.operation import Common, operation

Aligned = Annotated[str | None, typer.Option("--aligned", help="the aligned model that MODEL was fine-tuned from")]
Base = Annotated[str | None, typer.Option("--base", help="the pretrained model before alignment (safe-lora)")]
Unaligned = Annotated[
    str | None,
    typer.Option("--unaligned", help="your own model with the harm in it (resta); none is ever trained here"),
]
Picture = Annotated[
    str | None,
    typer.Option("--picture", help="draw the refusal direction's gap after every block: a .png, .svg or .pdf file"),
]


@functools.partial(operation, method="restore")
def recover_alignment(
    common: Common,
    aligned: Aligned = None,
    harmful: options.Harmful = None,
    task: options.Task = None,
    harmless: options.Harmless = None,
    base: Base = None,
    unaligned: Unaligned = None,
    judge: options.Judge = None,
    picture: Picture = None,
) -> None:
    """Repair a model, or an adapter (alignguard), that lost its refusals in fine-tuning, by its aligned parent.

    Example: llmsurgery recover-alignment CHILD --aligned PARENT --harmful h.jsonl --task t.jsonl -o OUT
    """
    from llmsurgery import api

    common.run(
        api.recover_alignment,
        aligned=aligned,
        harmful=harmful,
        task=task,
        harmless=harmless,
        base=base,
        unaligned=unaligned,
        judge=options.split_judge(judge),
        picture=picture,
    )
