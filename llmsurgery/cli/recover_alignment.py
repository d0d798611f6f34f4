"""`llmsurgery recover-alignment`."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from llmsurgery.cli.operation import Common, operation

Aligned = Annotated[str | None, typer.Option("--aligned", help="the aligned model that MODEL was fine-tuned from")]
Harmful = Annotated[
    str | None, typer.Option("--harmful", help="file of prompts that the aligned model refuses; never printed")
]
Task = Annotated[str | None, typer.Option("--task", help="data file of the task that MODEL was fine-tuned for")]
Harmless = Annotated[str | None, typer.Option("--harmless", help="file of prompts that are to be answered")]
Base = Annotated[str | None, typer.Option("--base", help="the pretrained model before alignment (safe-lora)")]
Unaligned = Annotated[
    str | None,
    typer.Option("--unaligned", help="your own model with the harm in it (resta); none is ever trained here"),
]
Judge = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="COMMAND",
        help="adds safety.harmful_rate: split like a shell command and run without one, reads JSONL with id, prompt, "
        "answer, writes JSONL with id, harmful",
    ),
]


@functools.partial(operation, method="restore")
def recover_alignment(
    common: Common,
    aligned: Aligned = None,
    harmful: Harmful = None,
    task: Task = None,
    harmless: Harmless = None,
    base: Base = None,
    unaligned: Unaligned = None,
    judge: Judge = None,
) -> None:
    """Repair a model that lost its refusals in fine-tuning, with weights of its aligned parent.

    Example: llmsurgery recover-alignment CHILD --aligned PARENT --harmful h.jsonl --task t.jsonl -o OUT
    """
    import shlex

    from llmsurgery import api
    from llmsurgery.errors import UsageError

    try:
        arguments = shlex.split(judge) if judge is not None else []
    except ValueError as error:
        raise UsageError("--judge cannot be split into arguments", str(error), "close every quotation") from error
    common.run(
        api.recover_alignment,
        aligned=aligned,
        harmful=harmful,
        task=task,
        harmless=harmless,
        base=base,
        unaligned=unaligned,
        judge=arguments,
    )
