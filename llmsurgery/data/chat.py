"""Rows to token ids: chat templates, the border between prompt and answer, exactly one end-of-sequence token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2

from llmsurgery.data.records import Message, Row
from llmsurgery.data.template_bounds import TemplateTimeError, bounded
from llmsurgery.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_TOKENS = 256
"""Longest chunk of plain text, for training and for measuring: both must see the same halves."""


_SPARE = 1_000_000
"""Characters that a template may add to its turns."""
_TEMPLATE = "correct chat_template in the tokenizer's files"
_RAISED = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    SyntaxError,
)
"""What the operations in a template raise, which are those of Python; also when it is too deep to be compiled."""


@dataclass(frozen=True)
class Encoded:
    """A row as token ids.

    Attributes:
        ids: Prompt, answer and end token.
        answer_start: Index of the first answer token.
        ends: Whether the last id is the end-of-sequence token.
        where: Origin of the row for messages.
    """

    ids: tuple[int, ...]
    answer_start: int
    ends: bool
    where: str = ""

    @property
    def labels(self) -> int:
        """Number of labelled tokens, the end token included."""
        return len(self.ids) - self.answer_start


class Encoder:
    """Turns rows into token ids with a model's tokenizer.

    A question or a chat goes through the tokenizer's chat template; without one it becomes
    "Question: ...\\nAnswer: ...". A prompt/completion pair is joined as it stands. Plain text has no prompt.

    Args:
        tokenizer: The model's tokenizer.
        max_length: Longest row in tokens that the model takes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.parts = False
        self.end_id = self._find_end_token()
        self.pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    def _find_end_token(self) -> int:
        """Return the token that ends an answer: the end of the assistant's turn where the template has one."""
        eos = int(self.tokenizer.eos_token_id)
        if not self.tokenizer.chat_template:
            return eos
        probe = "ANSWER"
        text = self._render([Message("user", "QUESTION"), Message("assistant", probe)], False, "chat template")
        if probe not in text:
            # The templates of vision-language models take what is said as a list of parts.
            self.parts = True
            text = self._render([Message("user", "QUESTION"), Message("assistant", probe)], False, "chat template")
        before, found, after = text.rpartition(probe)
        if not found:
            raise InputError(
                "the chat template does not show the assistant's answer",
                f"rendered: {before or after!r:.100}",
                "correct chat_template in the tokenizer's files",
            )
        tail = self._ids(after)
        # Llama 3 marks its end of turn as special without listing it among the named special tokens.
        added = self.tokenizer.added_tokens_decoder.items()
        special = {*self.tokenizer.all_special_ids, *(number for number, token in added if token.special)}
        return next((token for token in tail if token in special), eos)

    def _render(self, turns: Sequence[Message], generation: bool, where: str) -> str:
        messages = [
            {"role": turn.role, "content": [{"type": "text", "text": turn.content}] if self.parts else turn.content}
            for turn in turns
        ]
        try:
            # Some templates print today's date; a fixed one keeps figures the same from day to day.
            with bounded():
                text = str(
                    self.tokenizer.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=generation, date_string="10 Apr 2025"
                    )
                )
        except TemplateTimeError as error:
            raise InputError(f"{where}: the chat template does not come to an end", str(error), _TEMPLATE) from error
        except MemoryError as error:
            raise InputError(f"{where}: the chat template fills the memory", "more than 1 GiB", _TEMPLATE) from error
        except _RAISED as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise InputError(f"{where}: the chat template refuses these turns", reason, "check the roles") from error
        if len(text) > _SPARE + 10 * sum(len(turn.content) for turn in turns):
            raise InputError(f"{where}: the chat template makes {len(text)} characters of it", "", _TEMPLATE)
        return text

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_text(self, row: Row) -> str:
        """Return the rendered prompt of a row; empty for plain text."""
        if row.kind in {"text", "completion"}:
            return row.prompt
        if self.tokenizer.chat_template:
            turns = row.turns or (Message("user", row.prompt),)
            return self._render(turns, True, row.where)
        if row.turns:
            spoken = "\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in row.turns)
            return f"{spoken}\nAssistant: "
        return f"Question: {row.prompt}\nAnswer: "

    def _split(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Tokenize prompt and answer as one text; a token across the border belongs to the answer."""
        special = [] if self._starts_special(prompt) else self._prefix()
        if not self.tokenizer.is_fast:
            head = self._ids(prompt)
            return special + head + self._ids(answer), len(special) + len(head)
        encoded = self.tokenizer(prompt + answer, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        border = len(prompt)
        start = next((i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > border), len(ids))
        return special + ids, len(special) + start

    def locate(self, text: str, end: int) -> tuple[list[int], int, bool]:
        """Tokenize a prompt as it stands and find the token that holds the character before `end`.

        Args:
            text: The prompt, rendered.
            end: Number of characters of it that come before and with the one that is looked for.

        Returns:
            All ids, the index of the token (-1 if none holds the character), and whether the token ends there too.

        Raises:
            UnsupportedError: The tokenizer does not tell which characters a token stands for.
        """
        if not self.tokenizer.is_fast:
            raise UnsupportedError(
                "the tokenizer does not tell which characters a token stands for",
                "it has no fast form (tokenizer.json)",
                "save the tokenizer in its fast form",
            )
        special = [] if self._starts_special(text) else self._prefix()
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = encoded["offset_mapping"]
        # A character of several bytes may be spread over several tokens: the last of them has seen all of it.
        holding = [i for i, (low, high) in enumerate(spans) if low < end <= high]
        ids = special + list(encoded["input_ids"])
        return (ids, len(special) + holding[-1], spans[holding[-1]][1] == end) if holding else (ids, -1, False)

    def _prefix(self) -> list[int]:
        """Ids that the tokenizer puts before plain text, such as a beginning-of-sequence token."""
        empty = list(self.tokenizer("")["input_ids"])
        return [
            token for token in empty if token != self.tokenizer.eos_token_id or self.tokenizer.bos_token_id == token
        ]

    def text_prefix(self) -> tuple[int, ...]:
        """Return the ids that the tokenizer puts before a plain text."""
        return tuple(self._prefix())

    def text_ids(self, text: str) -> list[int]:
        """Return all ids of a plain text, none put before or behind it."""
        return self._ids(text)

    def _starts_special(self, prompt: str) -> bool:
        return any(prompt.startswith(token) for token in self.tokenizer.all_special_tokens)

    def encode(self, row: Row, answer: str | None = None, max_length: int | None = None) -> Encoded:
        """Encode one row with its own or another answer.

        Args:
            row: The row.
            answer: Replaces the row's answer, for example a template answer.
            max_length: Bound below the model's own.

        Raises:
            InputError: The row is longer than the bound, or its prompt or answer has no token.
        """
        ids, start = self._split(self.prompt_text(row), row.answer if answer is None else answer)
        ends = row.kind != "text"
        kept = ids[:start] + (self._without_end(ids[start:]) if ends else ids[start:])
        if start >= len(kept):
            raise InputError(f"{row.where}: the answer has no token", "it vanishes in the tokenizer", "remove this row")
        if ends and start == 0:
            # Nothing could predict the first token of the answer, and there is nothing to generate from.
            raise InputError(
                f"{row.where}: the prompt has no token of its own",
                "the tokenizer merges all of it with the answer",
                "put a blank between prompt and completion, or remove this row",
            )
        ids = [*kept, self.end_id] if ends else kept
        limit = min(self.max_length, max_length or self.max_length)
        if len(ids) > limit:
            raise InputError(
                f"{row.where}: {len(ids)} tokens ({len(ids) - start} of them the answer) do not fit into {limit}",
                f"the model takes {self.max_length} tokens"
                + (f" and max_length is {max_length}" if max_length and max_length < self.max_length else ""),
                "shorten the row" + (", or raise --set max_length=..." if limit < self.max_length else ""),
            )
        return Encoded(tuple(ids), start, ends, row.where)

    def encode_continuation(self, prompt: str, text: str, tokens: int | None, where: str = "") -> tuple[Encoded, int]:
        """Encode a plain text and how it goes on, without template and end token.

        The prompt loses its first tokens (not a beginning-of-sequence token) where it would leave no room.

        Args:
            prompt: The text.
            text: How it goes on; its first `tokens` tokens are kept.
            tokens: Room after the prompt; None: what the text needs.
            where: Origin for messages.

        Returns:
            The row, and the number of tokens that its prompt lost.

        Raises:
            InputError: Prompt or text has no token, or the model takes no more than what follows the prompt.
        """
        ids, start = self._split(prompt, text)
        prefix = self._prefix()
        lead = len(prefix) if ids[: len(prefix)] == prefix else 0
        tokens = len(ids) - start if tokens is None else tokens
        surplus = max(0, start + tokens - self.max_length)
        if start >= len(ids) or start - lead - surplus < 1:
            raise InputError(
                f"{where}: no token is left of the {'text' if start >= len(ids) else 'prompt'}",
                f"the model takes {self.max_length} tokens, and {tokens} follow the prompt",
                "remove this row, or take a model with a longer context",
            )
        kept = ids[:lead] + ids[lead + surplus : start] + ids[start : start + tokens]
        return Encoded(tuple(kept), start - surplus, False, where), surplus

    def encode_plain_prompt(self, prompt: str, room: int, where: str = "") -> tuple[Encoded, int]:
        """Encode a prompt as it stands and on its own, without template, for generation.

        It loses its first tokens (not a beginning-of-sequence token) where it would leave no room.

        Args:
            prompt: The prompt.
            room: New tokens that are to fit after it.
            where: Origin for messages.

        Returns:
            The prompt, and the number of tokens that it lost.

        Raises:
            InputError: No token is left of it.
        """
        ids, end = self._split(prompt, "")
        prefix = self._prefix()
        lead = len(prefix) if ids[: len(prefix)] == prefix else 0
        surplus = max(0, end + room - self.max_length)
        if end - lead - surplus < 1:
            raise InputError(
                f"{where}: no token is left of the prompt",
                f"the model takes {self.max_length} tokens, and {room} are to follow the prompt",
                "lower --set generation_tokens, or remove this row",
            )
        kept = ids[:lead] + ids[lead + surplus :]
        return Encoded(tuple(kept), len(kept), False, where), surplus

    def _without_end(self, ids: list[int]) -> list[int]:
        """Drop end tokens that an answer brings along, so that exactly one can follow."""
        stop = len(ids)
        while stop and ids[stop - 1] == self.end_id:
            stop -= 1
        return ids[:stop]

    def encode_chunks(self, row: Row, tokens: int) -> list[Encoded]:
        """Cut a plain text into chunks whose first half is the prompt and whose second half is the answer.

        Args:
            row: A row of kind "text".
            tokens: Longest chunk.

        Returns:
            The chunks; none for a text of fewer than four tokens, such as a heading.
        """
        ids = self._ids(row.answer)
        prefix = [] if self._starts_special(row.answer) else self._prefix()
        length = min(tokens, self.max_length) - len(prefix)
        parts = [tuple(ids[start : start + length]) for start in range(0, len(ids), length)]
        # A rest of a few tokens has no prompt worth the name; it joins nothing and is left out.
        return [
            Encoded((*prefix, *part), len(prefix) + len(part) // 2, False, row.where)
            for part in parts
            if len(part) >= 4
        ]

    def replace_answer(self, encoded: Encoded, answer: str, max_length: int) -> Encoded:
        """Return a chunk's prompt followed by another answer and the end token.

        The prompt loses its first tokens (not a beginning-of-sequence token) where the whole would be longer than
        `max_length`.

        Raises:
            InputError: The answer alone is too long.
        """
        tail = (*self._without_end(self._ids(answer)), self.end_id)
        prefix = tuple(self._prefix())
        lead = len(prefix) if encoded.ids[: len(prefix)] == prefix else 0
        room = min(self.max_length, max_length) - len(tail) - lead
        if room < 1:
            raise InputError(
                f"{encoded.where}: an answer of {len(tail)} tokens leaves no room for a prompt",
                f"max_length is {max_length}",
                "use shorter template answers, or raise --set max_length=...",
            )
        prompt = encoded.ids[:lead] + encoded.ids[lead : encoded.answer_start][-room:]
        return Encoded((*prompt, *tail), len(prompt), True, encoded.where)

    def encode_prompt(self, row: Row) -> Encoded:
        """Encode a row up to its answer, for generation; the ids equal the start of `encode`."""
        encoded = self.encode(row)
        return Encoded(encoded.ids[: encoded.answer_start], encoded.answer_start, False, row.where)

    def answer_text(self, encoded: Encoded) -> str:
        """Return the text of an encoded answer, without the end token."""
        stop = len(encoded.ids) - (1 if encoded.ends else 0)
        return str(self.tokenizer.decode(encoded.ids[encoded.answer_start : stop], skip_special_tokens=True)).strip()

    def encode_text(self, text: str, tokens: int) -> Encoded:
        """Encode the first tokens of a plain text, special tokens as the tokenizer adds them.

        Args:
            text: The text.
            tokens: How many tokens to keep.
        """
        limit = min(tokens, self.max_length)
        ids = tuple(self.tokenizer(text, truncation=True, max_length=limit)["input_ids"])
        return Encoded(ids, 1, False)
