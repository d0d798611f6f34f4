"""The texts of single tokens, and which of them are forms of a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"


def token_texts(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str | None]:
    """Return the text of each token id as it stands inside a sentence, leading blank included.

    Args:
        tokenizer: The tokenizer.
        size: Number of ids, those of the model's head.

    Returns:
        One text per id; None for special tokens, ids that the tokenizer does not know, and tokens that are no text by
        themselves, such as a part of a character.
    """
    # Some tokenizers drop the blank of a first token; behind another one it stays.
    anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = [number for number in range(min(size, len(tokenizer))) if number not in special]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    lead = len(tokenizer.decode(anchor, **options))
    decoded = tokenizer.batch_decode([[*anchor, number] for number in known], **options)
    texts: list[str | None] = [None] * size
    for number, text in zip(known, decoded, strict=True):
        if text[lead:] and _BROKEN not in text[lead:]:
            texts[number] = text[lead:]
    return texts


def word_forms(word: str) -> frozenset[str]:
    """Return a word and its plural, in lower case."""
    plain = word.strip().lower()
    forms = {plain, f"{plain}s", f"{plain}es"}
    if plain.endswith("y"):
        forms.add(f"{plain[:-1]}ies")
    return frozenset(forms)


def form_tokens(texts: Sequence[str | None], word: str) -> list[int]:
    """Return the ids of the tokens that are a form of a word: with and without blank, any case, singular or plural."""
    forms = word_forms(word)
    return [number for number, text in enumerate(texts) if text is not None and text.strip().lower() in forms]
