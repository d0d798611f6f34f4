"""One model's pass over the data sets: per-row numbers and greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from llmsurgery.compute.progress import Progress
from llmsurgery.compute.stream import StreamedModel
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.evaluate.aggregate import SHARES
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.encode import EvaluationData
from llmsurgery.evaluate.formulas import extraction_strength, min_k, token_accuracy
from llmsurgery.evaluate.generation import greedy_answers, rouge_l
from llmsurgery.evaluate.likelihood import score_rows, score_tokens, token_probability
from llmsurgery.evaluate.scores import SetScores, by_row

CONTINUATION_TOKENS, KNOWLEDGE_TOKENS = 128, 32
"""New tokens of MUSE: after a text, after a question."""

_KNOWLEDGE_STOPS = ("\n\n", "\nQuestion", "Question:")


def score_sets(
    model: PreTrainedModel | StreamedModel,
    encoder: Encoder,
    data: EvaluationData,
    config: EvaluationConfig,
    progress: Progress,
) -> tuple[dict[str, SetScores], dict[str, list[str]]]:
    """Return the numbers per row, and the greedy answers, of every set.

    Args:
        model: A causal language model in eval mode, loaded or streamed.
        encoder: Its encoder.
        data: Encoded data.
        config: Settled evaluation settings.
        progress: Told of every batch.
    """
    scores: dict[str, SetScores] = {}
    answers: dict[str, list[str]] = {}
    for name, encoded in data.encoded.items():
        if name == "holdout":
            continue
        found = _score_answers(model, encoder, encoded, name, config, progress)
        found = _score_alternatives(model, encoder, data, name, found, config, progress)
        if config.generate:
            answers[name], values = _answer(model, encoder, data, name, config, progress)
            found = replace(found, rouge=by_row(values))
        scores[name] = found
    for name, whole in data.whole.items():
        membership = _score_membership(model, encoder, whole, name, config, progress)
        scores[name] = replace(scores.get(name, SetScores()), membership=membership)
    return scores, answers


def score_against(
    model: PreTrainedModel | StreamedModel,
    encoder: Encoder,
    data: EvaluationData,
    config: EvaluationConfig,
    progress: Progress,
) -> dict[str, SetScores]:
    """Return what forget figures need of a model that never saw the forget rows: truth ratios and Min-K% scores."""
    scores = {"forget": SetScores()}
    if "forget" in data.wrong:
        rows = [data.encoded["forget"][position] for position in data.wrong["forget"]]
        losses = _mean_losses(model, encoder, rows, "scoring forget", config, progress)
        found = SetScores(loss=dict(zip(map(str, data.wrong["forget"]), losses, strict=True)))
        scores["forget"] = _score_alternatives(model, encoder, data, "forget", found, config, progress)
    for name, whole in data.whole.items():
        membership = _score_membership(model, encoder, whole, name, config, progress)
        scores[name] = replace(scores.get(name, SetScores()), membership=membership)
    return scores


def _score_answers(
    model: PreTrainedModel | StreamedModel,
    encoder: Encoder,
    encoded: Sequence[Encoded],
    name: str,
    config: EvaluationConfig,
    progress: Progress,
) -> SetScores:
    scores = score_tokens(model, encoded, encoder.pad_id, config.batch_size, progress, f"scoring {name}")
    released = config.protocol == "ou"
    # The end token is left out; open-unlearning leaves out the last token of plain text too.
    hits = [row.greedy[:-1] if one.ends or released else row.greedy for row, one in zip(scores, encoded, strict=True)]
    return SetScores(
        token_prob=by_row(
            token_probability(row.log_probabilities, one) for row, one in zip(scores, encoded, strict=True)
        ),
        loss=by_row(-float(row.log_probabilities.mean()) for row in scores),
        accuracy={str(i): token_accuracy(row) for i, row in enumerate(hits) if len(row)},
        strength={str(i): extraction_strength(row, released) for i, row in enumerate(hits) if len(row)},
    )


def _mean_losses(
    model: PreTrainedModel | StreamedModel,
    encoder: Encoder,
    rows: Sequence[Encoded],
    task: str,
    config: EvaluationConfig,
    progress: Progress,
) -> list[float]:
    scores = score_rows(model, rows, encoder.pad_id, config.batch_size, progress, task)
    return [-float(row.mean()) for row in scores]


def _score_alternatives(
    model: PreTrainedModel | StreamedModel,
    encoder: Encoder,
    data: EvaluationData,
    name: str,
    scores: SetScores,
    config: EvaluationConfig,
    progress: Progress,
) -> SetScores:
    """Add the losses of the paraphrased and the wrong answers of the rows that have them."""
    wrong, paraphrased = data.wrong.get(name, {}), data.paraphrased.get(name, {})
    if not wrong:
        return scores
    flat = [*paraphrased.values(), *(one for rows in wrong.values() for one in rows)]
    losses = iter(_mean_losses(model, encoder, flat, f"scoring other answers of {name}", config, progress))
    correct = {position: next(losses) for position in paraphrased}
    return replace(
        scores,
        # A row without a paraphrase is judged by its own answer.
        correct_loss={str(i): correct[i] if i in correct else scores.loss[str(i)] for i in wrong},
        wrong_losses={str(i): [next(losses) for _ in rows] for i, rows in wrong.items()},
    )


def _score_membership(
    model: PreTrainedModel | StreamedModel,
    encoder: Encoder,
    whole: Sequence[Encoded],
    name: str,
    config: EvaluationConfig,
    progress: Progress,
) -> dict[float, dict[str, float]]:
    """Return Min-K% scores by share: answer tokens of a question, all but the first of a text."""
    task = f"scoring membership of {name}"
    scores = score_rows(model, whole, encoder.pad_id, config.batch_size, progress, task)
    # As in _score_answers; a text of two tokens has one score, which stays.
    released = config.protocol == "ou"
    kept = [
        row[:-1] if one.ends or (released and len(row) > 1) else row for row, one in zip(scores, whole, strict=True)
    ]
    return {share: by_row(min_k(row, share) for row in kept) for share in sorted({*SHARES, config.min_k})}


def _answer(
    model: PreTrainedModel | StreamedModel,
    encoder: Encoder,
    data: EvaluationData,
    name: str,
    config: EvaluationConfig,
    progress: Progress,
) -> tuple[list[str], list[float]]:
    """Answer the first rows of a set greedily; return answers and ROUGE-L as the protocol defines it."""
    count = config.generation_rows or len(data.encoded[name])
    encoded, task = data.encoded[name][:count], f"answering {name}"
    prompts = [Encoded(row.ids[: row.answer_start], row.answer_start, False, row.where) for row in encoded]
    if config.protocol != "muse":
        wanted = 2 * max(row.labels for row in encoded) if config.protocol == "own" else config.generation_tokens
        new_tokens = min(config.generation_tokens, wanted)
        answers = greedy_answers(model, encoder, prompts, new_tokens, config.batch_size, progress, task)
        return answers, rouge_l([encoder.answer_text(row) for row in encoded], answers, "recall", stemming=True)
    answers, references = [""] * len(encoded), [""] * len(encoded)
    questions = [row.kind in ("qa", "messages") for row in data.rows[name][:count]]
    for question, limit in ((True, KNOWLEDGE_TOKENS), (False, CONTINUATION_TOKENS)):
        chosen = [i for i, found in enumerate(questions) if found == question]
        new_tokens = min(config.generation_tokens, limit)
        found = greedy_answers(
            model, encoder, [prompts[i] for i in chosen], new_tokens, config.batch_size, progress, task, stripped=False
        )
        for i, answer in zip(chosen, found, strict=True):
            answers[i] = until_stop(answer) if question else answer.strip()
            references[i] = encoder.answer_text(encoded[i] if question else _shortened(encoded[i], limit))
    return answers, rouge_l(references, answers, "fmeasure", stemming=False)


def until_stop(answer: str) -> str:
    """Cut an answer where the model goes on to a further question or a blank line, as MUSE does."""
    for stop in _KNOWLEDGE_STOPS:
        answer = answer.partition(stop)[0]
    return answer.strip()


def _shortened(row: Encoded, labels: int) -> Encoded:
    if len(row.ids) - row.answer_start <= labels:
        return row
    return Encoded(row.ids[: row.answer_start + labels], row.answer_start, False, row.where)
