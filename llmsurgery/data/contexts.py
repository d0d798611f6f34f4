"""Prompts about a name, and where in them the name ends: what a redirection acts on and is measured with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.data.chat import Encoded
from llmsurgery.data.pairs import SLOT
from llmsurgery.data.records import Row
from llmsurgery.errors import InputError

if TYPE_CHECKING:
    from llmsurgery.data.chat import Encoder

TEMPLATES = (
    " {}.",
    "Please answer the question about {}.",
    "Choose the best answer about {}.",
    "Write the answer about {}.",
    "Tell me about {}.",
    "Write something about {}.",
)
"""The contexts that keys and values are averaged over (arXiv 2506.07795); the user's turn of a chat."""

HELD_OUT = (
    "Who or what is {}?",
    "What is {} known for?",
    "Complete the sentence: {} is",
    "Give me three facts about {}.",
    "Is it true what they say about {}?",
    "In one word, {} stands for",
)
"""Contexts that no redirection uses: what it does to other wordings is read from them."""

RAW = "{}."
"""The context without chat template in which the released code reads the current value."""

SUFFIX = "Answer:"
"""What the released code puts after a chat template's generation prompt."""


@dataclass(frozen=True)
class Context:
    """A prompt that names something.

    Attributes:
        encoded: The prompt's tokens.
        last: Index of the token that holds the name's last character.
        exact: Whether the name ends where that token ends; else the token holds the start of what follows too.
        name: The name.
    """

    encoded: Encoded
    last: int
    exact: bool
    name: str


def make_context(encoder: Encoder, template: str, name: str, raw: bool = False) -> Context:
    """Return a template with a name in it as tokens.

    Args:
        encoder: The model's encoder.
        template: A text with one `{}`: the user's turn of a chat.
        name: The name.
        raw: Take the text as it stands, without chat template.

    Raises:
        InputError: The name has no token there, or the prompt is longer than the model takes.
        UnsupportedError: The tokenizer does not tell which characters a token stands for.
    """
    content = template.replace(SLOT, name)
    if raw:
        text = content
    else:
        text = encoder.prompt_text(Row("qa", content, "", where=repr(content)))
        # Without a chat template the prompt ends in these words already.
        text = text + SUFFIX if encoder.tokenizer.chat_template else text.rstrip()
    # The name may stand in a template's own words too, before the user's; a template may trim its blanks.
    place = text.rfind(content.strip())
    start = text.find(name.strip(), max(place, 0)) if place >= 0 else text.rfind(name.strip())
    if start < 0:
        raise InputError(f"{name!r} is not in its own prompt", f"the chat template made {text!r:.120} of it", "")
    end = start + len(name.strip())
    ids, last, exact = encoder.locate(text, end)
    if last < 0:
        raise InputError(f"{name!r} has no token", "the tokenizer drops it", "give another name")
    if len(ids) > encoder.max_length:
        raise InputError(
            f"a prompt about {name!r:.60} has {len(ids)} tokens", f"the model takes {encoder.max_length}", "shorten it"
        )
    return Context(Encoded(tuple(ids), len(ids), False, repr(name)), last, exact, name)


def make_contexts(encoder: Encoder, templates: Iterable[str], name: str) -> list[Context]:
    """Return several templates with one name; see `make_context`."""
    return [make_context(encoder, template, name) for template in templates]
