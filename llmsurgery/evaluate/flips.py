"""Whether questions about a redirected name are answered as the source model answers them about the new one.

    redirect.flipped    share of the forget rows that hold the old name in their question and are now answered, greedily
                        and word for word, with what the source says once the new name stands in its place

An answer may name whom it is about: both names count as one there. Rows whose two answers were the same to begin with
count too, so that the figure of the source need not be 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import Encoder
from llmsurgery.data.pairs import Pair
from llmsurgery.data.records import Row
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.encode import EvaluationData
from llmsurgery.evaluate.generation import greedy_answers
from llmsurgery.evaluate.intervals import Figure, mean_figure


@dataclass(frozen=True)
class Expected:
    """What is to be answered to a forget row.

    Attributes:
        pair: The redirection that the question falls under.
        answer: What the source answers with the new name in the question.
    """

    pair: Pair
    answer: str


def holds_name(row: Row, pairs: Sequence[Pair]) -> Pair | None:
    """Return the first pair of names whose old name stands in a question; None without one, or for a plain text."""
    if row.kind == "text":
        return None
    texts = [row.prompt, *(turn.content for turn in row.turns)]
    named = (pair for pair in pairs if pair.target and not pair.prompt)
    return next((pair for pair in named if any(pair.source in text for text in texts)), None)


def expected_answers(
    source: PreTrainedModel,
    encoder: Encoder,
    data: EvaluationData,
    pairs: Sequence[Pair],
    config: EvaluationConfig,
    progress: Progress,
) -> dict[int, Expected]:
    """Answer the forget rows that hold an old name with the new one in its place.

    Args:
        source: The source model.
        encoder: Its encoder.
        data: The encoded data sets; forget rows are taken as far as they are answered for ROUGE.
        pairs: The redirections.
        config: Settled evaluation settings.
        progress: Told of every batch.

    Returns:
        Number of the row -> what is expected; empty if answers are switched off or cut as in MUSE.

    Raises:
        InputError: A question is too long with the new name.
    """
    if not config.generate or config.protocol == "muse" or "forget" not in data.rows:
        return {}
    rows, encoded = data.rows["forget"], data.encoded["forget"]
    count = config.generation_rows or len(rows)
    found = {i: pair for i, row in enumerate(rows[:count]) if (pair := holds_name(row, pairs))}
    if not found:
        return {}
    prompts = [encoder.encode_prompt(_renamed(rows[i], pair)) for i, pair in found.items()]
    # As many tokens as the answers have that are compared with these.
    wanted = 2 * max(row.labels for row in encoded[:count]) if config.protocol == "own" else config.generation_tokens
    limit = min(config.generation_tokens, wanted)
    answers = greedy_answers(source, encoder, prompts, limit, config.batch_size, progress, "answering with new names")
    return {i: Expected(found[i], answer) for i, answer in zip(found, answers, strict=True)}


def flip_figure(answers: Sequence[str], expected: Mapping[int, Expected]) -> dict[str, Figure]:
    """Compare answers to forget rows with what is expected.

    Args:
        answers: Greedy answers to the first forget rows.
        expected: What `expected_answers` returned.
    """
    if not expected:
        return {}
    hits = [float(_of_target(answers[i], one.pair) == _of_target(one.answer, one.pair)) for i, one in expected.items()]
    return {"redirect.flipped": mean_figure(hits)}


def _renamed(row: Row, pair: Pair) -> Row:
    turns = tuple(
        dataclasses.replace(turn, content=turn.content.replace(pair.source, pair.target)) for turn in row.turns
    )
    return dataclasses.replace(row, prompt=row.prompt.replace(pair.source, pair.target), turns=turns)


def _of_target(answer: str, pair: Pair) -> str:
    return answer.replace(pair.source, pair.target).strip()
