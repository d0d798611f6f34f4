"""`llmsurgery remove-layernorm`."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from llmsurgery.cli.operation import Common, operation

Corpus = Annotated[
    str | None, typer.Option("--corpus", help="ordinary text to train on; the last windows are only measured")
]
Picture = Annotated[
    str | None,
    typer.Option("--picture", help="also draw the constants of all norms over the steps: a .png, .svg or .pdf file"),
]


@functools.partial(operation, method="fakeln")
def remove_layernorm(common: Common, corpus: Corpus = None, picture: Picture = None) -> None:
    """Make a model linear between attention and MLPs: train until no norm divides by anything but a constant.

    Example: llmsurgery remove-layernorm gpt2 --corpus text.jsonl --set preset=small -o OUT
    """
    from llmsurgery import api

    common.run(api.remove_layernorm, corpus=corpus, picture=picture)
