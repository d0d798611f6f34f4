"""A concept by name: the token that brings it up, and prompts that it follows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.data import GENERAL_TEXT
from llmsurgery.data.pairs import SLOT, Pair

if TYPE_CHECKING:
    from llmsurgery.data.chat import Encoder

REPEATED = "{0}, {0}, {0}, "
"""What comes before the name where no prompts are given: most models go on with the name."""


@dataclass(frozen=True)
class Concept:
    """A concept.

    Attributes:
        name: Its name.
        token: Its first token after a prompt, the most frequent if prompts differ.
        text: That token as text.
        tokens: How many tokens it has there.
        makers: Token ids of the prompts that its direction is made from.
        tests: Token ids of other prompts, each with the concept's first token; the same if there is one alone, none
            where no prompts are given.
        given: Whether prompts were given.
    """

    name: str
    token: int
    text: str
    tokens: int
    makers: tuple[tuple[int, ...], ...]
    tests: tuple[tuple[tuple[int, ...], int], ...]
    given: bool


def make_concept(encoder: Encoder, pair: Pair, prompts: Sequence[str] = ()) -> Concept:
    """Return the source of a pair as a concept.

    Args:
        encoder: The model's encoder.
        pair: The pair; of its prompts what stands before the name is used, where there is any.
        prompts: Further texts that the name follows.

    Raises:
        InputError: The name has no token after a prompt.
    """
    heads = [text.partition(SLOT)[0] for text in pair.prompts]
    heads = [head for head in heads if head.strip()]
    heads += [text.partition(SLOT)[0] if SLOT in text else text for text in prompts]
    given = bool(heads)
    found: list[tuple[tuple[int, ...], int, int]] = []
    for head in heads or [REPEATED.format(pair.source)]:
        blank = "" if head[-1:].isspace() or not pair.source[:1].isalnum() else " "
        encoded, _ = encoder.encode_continuation(head + blank, pair.source, None, pair.where)
        start = encoded.answer_start
        found.append((encoded.ids[:start], encoded.ids[start], len(encoded.ids) - start))
    tokens = [token for _, token, _ in found]
    token = max(tokens, key=lambda one: (tokens.count(one), -tokens.index(one)))
    own = [entry for entry in found if entry[1] == token]
    makers = own[::2]
    others = [entry for entry in found if entry not in makers] or own
    return Concept(
        name=pair.source,
        token=token,
        text=str(encoder.tokenizer.decode([token])),
        tokens=own[0][2],
        makers=tuple(ids for ids, _, _ in makers),
        tests=tuple((ids, first) for ids, first, _ in others) if given else (),
        given=given,
    )


def words_with(encoder: Encoder, concept: Concept) -> list[str]:
    """Return other words that begin with a concept's first token: from the shipped texts, frequent ones first.

    Args:
        encoder: The model's encoder.
        concept: The concept.
    """
    own = {word.lower() for word in re.findall(r"\w+", concept.name)}
    counts: dict[str, int] = {}
    for line in GENERAL_TEXT.read_text("utf-8").splitlines():
        for word in re.findall(r"\w+", json.loads(line)["text"]):
            counts[word] = counts.get(word, 0) + 1
    words = [word for word in sorted(counts, key=lambda one: (-counts[one], one)) if word.lower() not in own]
    blank = " " if concept.text[:1].isspace() else ""
    encoded = encoder.tokenizer([blank + word for word in words], add_special_tokens=False)["input_ids"]
    return [word for word, ids in zip(words, encoded, strict=True) if ids and ids[0] == concept.token]
