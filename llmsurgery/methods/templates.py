"""Template answers ("I do not know."), and forget rows with such an answer in place of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row

TEMPLATE_LISTS = ("idk", "refusal", "copyright", "demo")
TEMPLATES_HELP = "template answers: idk, refusal, copyright, demo, or a file with one sentence a line"


@dataclass(frozen=True)
class TemplateRows:
    """Encoded forget rows, and the same prompts with a template answer.

    Attributes:
        forget: Prompt and forget answer of each row.
        templates: The template answers.
        pair: Returns the prompt of a row with a template answer.
        preferred: The chosen answer of each row that is a preference pair, None for others.
    """

    forget: list[Encoded]
    templates: list[str]
    pair: Callable[[int, str], Encoded]
    preferred: list[str | None] = field(default_factory=list)

    def record(self) -> dict[str, object]:
        """Return what the manifest says of the templates."""
        digest = hashlib.sha256("\n".join(self.templates).encode()).hexdigest()
        return {"templates": {"count": len(self.templates), "sha256": digest}}


def encode_with_templates(
    encoder: Encoder, rows: Sequence[Row], templates: list[str], max_length: int
) -> TemplateRows:  # fmt: skip
    """Encode forget rows with their own and with every template answer.

    Of a plain text, cut into chunks, the first half is the prompt.

    Raises:
        InputError: A row or its longest pair is too long, or nothing is left to train on.
    """
    from llmsurgery.data.chat import CHUNK_TOKENS
    from llmsurgery.data.records import Row
    from llmsurgery.errors import InputError

    forget: list[Encoded] = []
    origins: list[Row] = []
    for row in rows:
        if row.kind == "text":
            parts = encoder.encode_chunks(row, min(max_length, CHUNK_TOKENS))
        else:
            parts = [encoder.encode(row, None, max_length)]
        forget += parts
        origins += [row] * len(parts)

    @cache
    def pair(index: int, template: str) -> Encoded:
        if origins[index].kind == "text":
            return encoder.replace_answer(forget[index], template, max_length)
        return encoder.encode(origins[index], template, max_length)

    if not forget:
        raise InputError("no forget row can be trained on", "every passage has fewer than four tokens", "")

    # The longest pair of all fails here rather than in the middle of training.
    longest = max(
        templates, key=lambda template: encoder.encode(Row("text", "", template, where=_place(template))).labels
    )
    pair(max(range(len(forget)), key=lambda i: forget[i].answer_start), longest)
    preferred = [row.preferred for row in origins]
    for number, answer in enumerate(preferred):
        if answer is not None:
            pair(number, answer)
    return TemplateRows(forget, templates, pair, preferred)


def _place(template: str, shown: int = 40) -> str:
    return f"template answer {template[:shown] + ('...' if len(template) > shown else '')!r}"


def load_templates(name: str) -> list[str]:
    """Return a shipped list of template answers by name, or the lines of a user's file.

    Raises:
        InputError: The file is missing or empty.
        UsageError: Neither a list nor a path.
    """
    from llmsurgery.data import TEMPLATES
    from llmsurgery.data.records import read_lines
    from llmsurgery.demo import world_path
    from llmsurgery.errors import unknown_name

    if name == "demo":
        return read_lines(world_path("templates.txt"))
    if name in TEMPLATE_LISTS:
        return read_lines(TEMPLATES / f"{name}.txt")
    if Path(name).exists() or Path(name).suffix or "/" in name:
        return read_lines(name)
    raise unknown_name("template list", name, TEMPLATE_LISTS, "or give the path of a file with one sentence a line")
