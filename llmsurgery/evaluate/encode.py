"""Data sets as token ids, encoded once so that before and after are measured on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from llmsurgery.data.chat import CHUNK_TOKENS, Encoded, Encoder
from llmsurgery.data.records import Row
from llmsurgery.errors import InputError
from llmsurgery.evaluate.config import EvaluationConfig, settle
from llmsurgery.evaluate.letters import LetterSet
from llmsurgery.evaluate.listings import ListingSet
from llmsurgery.evaluate.stereotypes import StereotypeSet


@dataclass(frozen=True)
class EvaluationData:
    """Encoded data sets.

    Attributes:
        rows: Set name -> rows ("forget", "retain", "holdout", "authors", "facts").
        encoded: Set name -> encoded rows; a plain text stands as chunks, under its row each.
        texts: Encoded plain texts.
        paraphrased: Set name -> position -> the same prompt with the paraphrased answer.
        wrong: Set name -> position -> the same prompt with each wrong answer.
        skipped: Set name -> passages too short to be cut into prompt and answer.
        whole: Set name -> what membership is judged on: rows as they are, plain texts uncut.
        letters: Multiple-choice questions in every cyclic order, or None.
        listings: The same questions with their options apart, for position-invariant inference, or None.
        stereotypes: Pairs of sentences of which one is the stereotype, or None.
        domain: Encoded rows of the domain that is pruned for.
    """

    rows: dict[str, list[Row]]
    encoded: dict[str, list[Encoded]]
    texts: list[Encoded]
    paraphrased: dict[str, dict[int, Encoded]] = field(default_factory=dict)
    wrong: dict[str, dict[int, list[Encoded]]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    whole: dict[str, list[Encoded]] = field(default_factory=dict)
    letters: LetterSet | None = None
    listings: ListingSet | None = None
    stereotypes: StereotypeSet | None = None
    domain: list[Encoded] = field(default_factory=list)

    @property
    def available(self) -> set[str]:
        """Names of the data that metrics can be computed from."""
        return set(self.rows) | ({"text"} if self.texts else set())


def encode_data(
    encoder: Encoder,
    sets: dict[str, list[Row]],
    texts: Sequence[Row],
    config: EvaluationConfig,
    chunk_tokens: int = CHUNK_TOKENS,
) -> EvaluationData:
    """Encode data sets for measuring.

    Args:
        encoder: The model's encoder.
        sets: Set name -> rows; rows of plain text are cut into chunks.
        texts: Plain text rows; the first `text_rows` of enough length are used.
        config: Evaluation settings.
        chunk_tokens: Longest chunk of plain text in a set, the same as in training.

    Raises:
        InputError: A row does not fit into the model, or no text is long enough.
    """
    config = settle(config)
    data = EvaluationData({}, {}, [])
    for name, members in sets.items():
        kept = members[: config.rows or None] if name in ("forget", "retain") else members
        if name == "holdout":
            data.rows[name], data.encoded[name] = kept, encode_whole(encoder, kept, config)
        else:
            _encode_set(data, encoder, name, kept, config, chunk_tokens)
    if "holdout" in sets and "forget" in sets:
        forget = sets["forget"][: config.rows or None]
        data.whole["forget"] = encode_whole(encoder, forget, config)
        data.whole["holdout"] = data.encoded["holdout"]
    chosen = (encoder.encode_text(row.answer, config.text_tokens) for row in texts)
    data.texts.extend(islice((text for text in chosen if len(text.ids) > 8), config.text_rows))
    if texts and not data.texts:
        raise InputError("no text has more than 8 tokens", "perplexity needs longer passages", "give another --text")
    return data


def _encode_set(
    data: EvaluationData,
    encoder: Encoder,
    name: str,
    members: Sequence[Row],
    config: EvaluationConfig,
    chunk_tokens: int,
) -> None:
    rows: list[Row] = []
    encoded: list[Encoded] = []
    for row in members:
        if config.truth_ratio and row.perturbed_answers:
            wrong = data.wrong.setdefault(name, {})
            wrong[len(rows)] = [encoder.encode(row, answer) for answer in row.perturbed_answers]
            if row.paraphrased_answer is not None:
                paraphrased = data.paraphrased.setdefault(name, {})
                paraphrased[len(rows)] = encoder.encode(row, row.paraphrased_answer)
        parts = encoder.encode_chunks(row, chunk_tokens) if row.kind == "text" else [encoder.encode(row)]
        rows += [row] * len(parts)
        encoded += parts
        if not parts:
            data.skipped[name] = data.skipped.get(name, 0) + 1
    if not encoded:
        raise InputError(f"every passage of --{name} has fewer than four tokens", "nothing can be measured", "")
    data.rows[name], data.encoded[name] = rows, encoded


def encode_domain(encoder: Encoder, rows: Sequence[Row], config: EvaluationConfig) -> list[Encoded]:
    """Encode rows of a domain for its perplexity: texts, the first `text_tokens` of each, or answers to prompts.

    Raises:
        InputError: No row is long enough.
    """
    encoded = []
    for row in rows:
        if row.kind == "text":
            encoded.append(encoder.encode_text(row.answer, config.text_tokens))
        else:
            encoded.append(encoder.encode(row))
    encoded = [row for row in encoded if len(row.ids) > 8][: config.text_rows]
    if not encoded:
        raise InputError("no row of --domain has more than 8 tokens", "perplexity needs longer rows", "give others")
    return encoded


def encode_whole(encoder: Encoder, members: Sequence[Row], config: EvaluationConfig) -> list[Encoded]:
    """Encode rows for membership: answers with their prompts, plain texts uncut up to `membership_tokens`."""
    whole = [
        encoder.encode_text(row.answer, config.membership_tokens) if row.kind == "text" else encoder.encode(row)
        for row in members
    ]
    # Nothing predicts the first token of a text.
    return [row for row in whole if row.labels > 0]
