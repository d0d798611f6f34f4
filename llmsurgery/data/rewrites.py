"""Facts to rewrite as tokens: a prompt about a subject, the token at which a model looks the subject up, the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.data.pairs import SLOT
from llmsurgery.data.records import Row
from llmsurgery.errors import InputError

if TYPE_CHECKING:
    from llmsurgery.data.chat import Encoder

TOKENS = ("subject", "last")
"""Lookup tokens: the last one of the subject, or the last one of the prompt."""

KEPT = "{} is a"
"""The prompt whose prediction is to stay while a value is looked for (arXiv 2202.05262)."""

_BLANK_AFTER = ".,:;!)"


@dataclass(frozen=True)
class Lookup:
    """A prompt with an answer, perhaps none.

    Attributes:
        ids: Prompt and answer, without end token.
        position: Index of the lookup token.
        start: Index of the first answer token; len(ids) without an answer.
        subject: Indices of the first and of the last token of the subject.
    """

    ids: tuple[int, ...]
    position: int
    start: int
    subject: tuple[int, int]

    @property
    def key_ids(self) -> tuple[int, ...]:
        """The tokens that decide what is seen at the lookup token."""
        return self.ids[: self.position + 1]


@dataclass(frozen=True)
class Rewrite:
    """One key and what is to be said at it.

    Attributes:
        subject: The subject.
        contexts: The prompts in every context, the bare ones first; their count is that of `keys` times the prompts.
        keys: The first prompt in every context, the bare one first.
        kept: The prompt whose prediction is to stay.
        where: Origin for messages.
    """

    subject: str
    contexts: tuple[Lookup, ...]
    keys: tuple[Lookup, ...]
    kept: Lookup
    where: str


def is_question(template: str) -> bool:
    """Whether a prompt is asked, in the user's turn of a chat, and not gone on with."""
    return template.rstrip().endswith("?")


def encode_lookup(
    encoder: Encoder, template: str, subject: str, answer: str, token: str, opening: str = "", where: str = ""
) -> Lookup:
    """Return a prompt with its answer as tokens.

    A question goes through the chat template, or becomes "Question: ...\\nAnswer: ..."; any other text is gone on with
    as it stands.

    Args:
        encoder: The model's encoder.
        template: The prompt with one `{}` for the subject.
        subject: The subject.
        answer: The answer; "" for none.
        token: One of `TOKENS`.
        opening: A sentence before the prompt, without its full stop.
        where: Origin for messages.

    Raises:
        InputError: Subject or answer has no token of its own, or the whole is too long.
        UnsupportedError: The tokenizer does not tell which characters a token stands for.
    """
    subject, answer = subject.strip(), answer.strip()
    lead = f"{opening}. " if opening else ""
    content = lead + template.replace(SLOT, subject)
    end = len(lead) + template.index(SLOT) + len(subject)
    if is_question(template):
        given = encoder.prompt_text(Row("qa", content, "", where=where))
        place = given.rfind(content.strip())
        if place < 0:
            raise InputError(f"{where}: the prompt is not in its own chat", f"it became {given!r:.120}", "")
        end += place - (len(content) - len(content.lstrip()))
        given = given if answer or encoder.tokenizer.chat_template else given.rstrip()
    else:
        given = content if answer and content[-1].isspace() else content.rstrip()
        blank = given[-1:].isalnum() or given[-1:] in _BLANK_AFTER
        answer = f" {answer}" if answer and blank else answer
    ids, last, _ = encoder.locate(given + answer, end)
    _, first, _ = encoder.locate(given + answer, end - len(subject) + 1)
    start = len(ids)
    if answer:
        encoded = encoder.encode(Row("completion", given, answer, where=where))
        if list(encoded.ids[:-1]) != ids:
            raise InputError(f"{where}: text and tokens do not agree", "the answer holds an end token", "remove it")
        start = encoded.answer_start
    if len(ids) > encoder.max_length:
        raise InputError(f"{where}: {len(ids)} tokens are too many", f"the model takes {encoder.max_length}", "")
    if not 0 <= first <= last < start:
        raise InputError(
            f"{where}: {subject!r} has no token before the answer", "the tokenizer merges them", "add words between"
        )
    return Lookup(tuple(ids), last if token == "subject" else start - 1, start, (first, last))


def make_rewrite(
    encoder: Encoder,
    template: str,
    subject: str,
    answer: str,
    token: str,
    openings: Sequence[str] = (),
    where: str = "",
) -> Rewrite:
    """Return a fact in its bare prompt and after openings; see `encode_lookup`."""
    contexts = tuple(
        encode_lookup(encoder, template, subject, answer, token, opening, where) for opening in ("", *openings)
    )
    kept = encode_lookup(encoder, KEPT, subject, "", token, where=where)
    return Rewrite(subject, contexts, contexts, kept, where)


def merged(rewrites: Sequence[Rewrite]) -> list[Rewrite]:
    """Put facts that are looked up at one and the same key together, since one key holds one value.

    What comes before the last token of a subject decides its key, so that all facts "X ..." share that of X.
    """
    groups: dict[tuple[int, ...], list[Rewrite]] = {}
    for rewrite in rewrites:
        groups.setdefault(rewrite.keys[0].key_ids, []).append(rewrite)
    result = []
    for members in groups.values():
        first = members[0]
        # Interleaved, so that the bare prompts of all of them come first.
        contexts = [context for row in zip(*(member.contexts for member in members), strict=True) for context in row]
        result.append(Rewrite(first.subject, tuple(contexts), first.keys, first.kept, first.where))
    return result
