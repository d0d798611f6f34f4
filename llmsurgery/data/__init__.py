"""Data files, chat rendering, masks and batches."""

from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
"""Shipped lists of template answers, one sentence a line."""

GENERAL_TEXT = Path(__file__).parent / "general_text.jsonl"
"""Shipped passages on everyday subjects: the default for `utility.ppl` and `utility.kl`."""
