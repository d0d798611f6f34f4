"""Windows of equal length, without padding, out of the rows of a data file: what activations are measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from llmsurgery.data.chat import Encoder
from llmsurgery.data.records import Row
from llmsurgery.errors import InputError

Window = tuple[int, ...]

SHORTEST = 4
"""Tokens of a piece at least."""


def pack_windows(encoder: Encoder, rows: Sequence[Row], length: int, count: int, name: str) -> list[Window]:
    """Join rows with the end token and cut the whole into windows.

    A window begins with the token that begins a text, if the tokenizer has one: models put much of their attention on
    it. What is left over at the end is dropped.

    Args:
        encoder: The model's encoder.
        rows: Rows of any kind; questions and chats go through the chat template.
        length: Tokens of a window.
        count: Windows at most.
        name: The data option, for the message.

    Returns:
        At least one window.

    Raises:
        InputError: The rows have fewer tokens than one window.
    """
    prefix = encoder.text_prefix()
    body = length - len(prefix)
    stream = _tokens(encoder, rows)
    windows: list[Window] = []
    seen = 0
    while len(windows) < count:
        part = tuple(islice(stream, body))
        seen += len(part)
        if len(part) < body:
            break
        windows.append((*prefix, *part))
    if not windows:
        raise InputError(
            f"--{name} has {seen} tokens, one window takes {body}",
            "nothing can be measured on less than one window",
            "give more text, or shorter windows (--set window=...)",
        )
    return windows


def text_pieces(encoder: Encoder, rows: Sequence[Row], length: int, count: int | None = None) -> list[Window]:
    """Join rows as `pack_windows` does, and cut the whole into pieces of which the last one may be shorter.

    Args:
        encoder: The model's encoder.
        rows: Rows of any kind.
        length: Tokens of a piece at most.
        count: Pieces at most; None for all.

    Returns:
        The pieces; a rest of fewer than four tokens is left out.
    """
    prefix = encoder.text_prefix()
    stream = _tokens(encoder, rows)
    pieces: list[Window] = []
    while count is None or len(pieces) < count:
        part = tuple(islice(stream, length - len(prefix)))
        if len(part) < SHORTEST:
            break
        pieces.append((*prefix, *part))
    return pieces


def _tokens(encoder: Encoder, rows: Sequence[Row]) -> Iterator[int]:
    """Yield the tokens of rows one after the other, an end token behind each."""
    for row in rows:
        if row.kind == "text":
            yield from encoder.text_ids(row.answer)
            yield encoder.end_id
        else:
            yield from encoder.encode(row).ids
