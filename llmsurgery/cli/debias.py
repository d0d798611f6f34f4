"""`llmsurgery debias`."""

from __future__ import annotations

from llmsurgery.cli import options
from llmsurgery.cli.operation import Common, operation


@operation
def debias(common: Common, mcq: options.Mcq = None, contrast: options.Contrast = None) -> None:
    """Take away a prior of answer letters, or a bias between groups.

    Example: llmsurgery debias MODEL --method pride --mcq questions.jsonl -o OUT
    """
    from llmsurgery import api

    common.run(api.debias, mcq=mcq, contrast=contrast)
