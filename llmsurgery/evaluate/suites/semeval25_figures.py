"""The figures of SemEval-2025 Task 4 on a live model; `semeval25` says what they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.data.choices import Question
from llmsurgery.data.lume import Document, TaskRow
from llmsurgery.errors import InputError
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.encode import EvaluationData
from llmsurgery.evaluate.figures import Measurement
from llmsurgery.evaluate.generation import greedy_answers, rouge_l_recall
from llmsurgery.evaluate.intervals import Draw, Figure, resampled_interval
from llmsurgery.evaluate.likelihood import score_rows
from llmsurgery.evaluate.semeval25 import (
    MMLU_CHANCE,
    MMLU_FLOOR,
    SemevalScore,
    TaskScores,
    document_auc,
    exact_match,
    membership_score,
    task_aggregate,
)
from llmsurgery.evaluate.suites.semeval25 import TESTS
from llmsurgery.evaluate.suites.wmdp_figures import encode_letters, letter_scores

Key = TypeVar("Key", str, tuple[str, str])
Kept = TypeVar("Kept")
Numbers = npt.NDArray[np.float64]
Statistic = Callable[[Draw], float]
Term = tuple[str, str]
"""Task and test."""


@dataclass(frozen=True)
class SemevalValues:
    """Numbers per row; a part that is not measured is empty.

    Attributes:
        tasks: "forget" and "retain" -> term -> ROUGE-L recall, or 1 for an exact match.
        documents: "member" and "nonmember" -> mean token loss, nats.
        subjects: Subject of MMLU -> 1 for a right letter.
    """

    tasks: Mapping[str, Mapping[Term, Numbers]]
    documents: Mapping[str, Numbers]
    subjects: Mapping[str, Numbers]


@dataclass(frozen=True)
class SemevalEncoding:
    """The parts as the tokens of one model.

    Attributes:
        tasks: "forget" and "retain" -> rows that are answered.
        prompts: The same -> their prompts.
        documents: "member" and "nonmember" -> documents.
        questions: Questions of MMLU, subject by subject.
        letters: Four rows per question: the prompt and a letter.
        counts: Prompts and documents that were cut or left out.
        new_tokens: New tokens per answer at most.
    """

    tasks: Mapping[str, Sequence[TaskRow]]
    prompts: Mapping[str, Sequence[Encoded]]
    documents: Mapping[str, Sequence[Encoded]]
    questions: Sequence[Question]
    letters: Sequence[Encoded]
    counts: Mapping[str, int]
    new_tokens: int

    @property
    def encoded(self) -> Sequence[Encoded]:
        """Everything that the model reads."""
        groups = (*self.prompts.values(), *self.documents.values(), self.letters)
        return [row for rows in groups for row in rows]

    def add_to(self, data: EvaluationData) -> None:
        """Add nothing: everything is measured alone."""

    def measure(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        measured: Measurement,
        batch_size: int,
        progress: Progress,
        before: Measurement | None = None,
    ) -> dict[str, Figure]:
        """Return the parts, and the final score if all are there; arguments as for `Encoding.measure`."""
        options = (encoder.pad_id, batch_size, progress)
        tasks = {
            split: self._answer(split, rows, model, encoder, batch_size, progress)
            for split, rows in self.tasks.items()
            if rows
        }
        documents = {
            side: np.array([-row.mean() for row in score_rows(model, rows, *options, f"scoring {side} documents")])
            for side, rows in self.documents.items()
            if rows
        }
        subjects: dict[str, Numbers] = {}
        shown: dict[str, object] = {"dtype": str(model.dtype).removeprefix("torch."), **self.counts}
        shown["new_tokens"] = self.new_tokens
        if self.letters:
            letters = letter_scores(score_rows(model, self.letters, *options, "scoring answer letters"))
            hits = letters.argmax(1) == np.array([question.answer for question in self.questions])
            subjects = _grouped([question.subject for question in self.questions], hits.astype(np.float64))
            shown["letter_mass"] = float(np.exp(letters).sum(1).mean())
        return semeval_figures(SemevalValues(tasks, documents, subjects), shown)

    def _answer(
        self,
        split: str,
        rows: Sequence[TaskRow],
        model: PreTrainedModel,
        encoder: Encoder,
        batch_size: int,
        progress: Progress,
    ) -> dict[Term, Numbers]:
        name = f"answering {split} rows"
        answers = greedy_answers(model, encoder, self.prompts[split], self.new_tokens, batch_size, progress, name)
        recalls = rouge_l_recall([row.reference for row in rows], answers)
        values = [
            recall if row.test == "regurgitation" else float(exact_match(row.reference, answer))
            for row, answer, recall in zip(rows, answers, recalls, strict=True)
        ]
        return _grouped([(row.task, row.test) for row in rows], np.array(values))


def semeval_figures(values: SemevalValues, shown: Mapping[str, object] | None = None) -> dict[str, Figure]:
    """Return the parts that were measured, and the final score if these are all.

    Args:
        values: Numbers per row.
        shown: How they were measured, by name: "new_tokens" and "shortened_prompts" for the tasks, "left_out_documents"
            and "cut_documents" for membership, "letter_mass" and "shortened_questions" for MMLU, "dtype" for all.
    """
    shown = shown or {}
    figures: dict[str, Figure] = {}
    samples: list[Numbers] = []

    def add(name: str, statistic: Statistic, own: Sequence[Numbers], detail: Mapping[str, object], *told: str) -> None:
        samples.extend(own)
        how = {one: shown[one] for one in (*told, "dtype") if one in shown}
        figures[f"semeval25.{name}"] = _figure(statistic, own, {**detail, **how})

    if values.tasks:
        terms = [part for found in values.tasks.values() for part in found.values()]
        by_task = {split: _by_task(found) for split, found in values.tasks.items()}
        add("task_aggregate", partial(_aggregate, values), terms, by_task, "new_tokens", "shortened_prompts")
    if values.documents:
        counts = {side: len(part) for side, part in values.documents.items()}
        detail = {"auc": _auc(values, np.arange), **counts}
        own = list(values.documents.values())
        add("mia", partial(_membership, values), own, detail, "left_out_documents", "cut_documents")
    if values.subjects:
        own = list(values.subjects.values())
        detail = {"subjects": len(own), "over_questions": float(np.concatenate(own).mean()), "shots": 0}
        detail |= {"chance": MMLU_CHANCE, "floor": MMLU_FLOOR}
        add("mmlu", partial(_accuracy, values), own, detail, "letter_mass", "shortened_questions")
    if values.tasks and values.documents and values.subjects:
        add("final", partial(_final, values), list(samples), {})
    return figures


def _figure(statistic: Statistic, samples: Sequence[Numbers], detail: Mapping[str, object]) -> Figure:
    interval = resampled_interval(statistic) if min(map(len, samples)) > 1 else None
    return Figure(statistic(np.arange), sum(map(len, samples)), interval, detail)


def _mean(part: Numbers, draw: Draw) -> float:
    return float(part[draw(len(part))].mean())


def _scores(terms: Mapping[Term, Numbers], draw: Draw) -> list[TaskScores]:
    tasks = sorted({task for task, _ in terms})
    return [TaskScores(*(_mean(terms[task, test], draw) for test in TESTS)) for task in tasks]


def _aggregate(values: SemevalValues, draw: Draw) -> float:
    return task_aggregate(*(_scores(values.tasks[split], draw) for split in ("forget", "retain")))


def _auc(values: SemevalValues, draw: Draw) -> float:
    return document_auc(
        *(values.documents[side][draw(len(values.documents[side]))] for side in ("member", "nonmember"))
    )


def _membership(values: SemevalValues, draw: Draw) -> float:
    return membership_score(_auc(values, draw))


def _accuracy(values: SemevalValues, draw: Draw) -> float:
    return float(np.mean([_mean(part, draw) for part in values.subjects.values()]))


def _final(values: SemevalValues, draw: Draw) -> float:
    return SemevalScore(_aggregate(values, draw), _membership(values, draw), _accuracy(values, draw)).final


def _by_task(terms: Mapping[Term, Numbers]) -> dict[str, dict[str, float]]:
    tasks = sorted({task for task, _ in terms})
    return {task: {test: float(terms[task, test].mean()) for test in TESTS} for task in tasks}


def _grouped(keys: Sequence[Key], values: Numbers) -> dict[Key, Numbers]:
    found: dict[Key, list[float]] = {}
    for key, value in zip(keys, values.tolist(), strict=True):
        found.setdefault(key, []).append(value)
    return {key: np.array(part) for key, part in found.items()}


def _first(rows: Sequence[Kept], key: Callable[[Kept], object], bound: int | None) -> list[Kept]:
    """Return the first rows of every group, group by group."""
    groups: dict[object, list[Kept]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return [row for group in groups.values() for row in group[: bound or None]]


def encode_semeval(
    encoder: Encoder,
    tasks: Mapping[str, Sequence[TaskRow]],
    documents: Mapping[str, Sequence[Document]],
    questions: Sequence[Question],
    evaluation: EvaluationConfig,
) -> SemevalEncoding:
    """Encode the rows of every part.

    Args:
        encoder: The model's encoder.
        tasks: "forget" and "retain" -> rows, empty if the part is not measured.
        documents: "member" and "nonmember" -> documents, likewise.
        questions: Questions of MMLU, likewise.
        evaluation: Settled evaluation settings.

    Raises:
        InputError: A prompt has no token, or no document of a side has two.
    """
    bounds = [bound for bound in (evaluation.rows, evaluation.generation_rows) if bound]
    answered = {
        split: _first(rows, lambda row: (row.task, row.test), min(bounds, default=None))
        for split, rows in tasks.items()
    }
    counts = {"shortened_prompts": 0, "left_out_documents": 0, "cut_documents": 0, "shortened_questions": 0}
    prompts: dict[str, list[Encoded]] = {split: [] for split in answered}
    for split, rows in answered.items():
        for row in rows:
            prompt, lost = encoder.encode_plain_prompt(row.prompt, evaluation.generation_tokens, row.where)
            prompts[split].append(prompt)
            counts["shortened_prompts"] += lost > 0
    whole = {
        side: _whole(encoder, side, found[: evaluation.rows or None], evaluation, counts)
        for side, found in documents.items()
    }
    asked = _first(questions, lambda question: question.subject, evaluation.rows)
    letters: list[Encoded] = []
    for question in asked:
        found, lost = encode_letters(encoder, question, question.subject.replace("_", " "))
        letters += found
        counts["shortened_questions"] += lost > 0
    return SemevalEncoding(answered, prompts, whole, asked, letters, counts, evaluation.generation_tokens)


def _whole(
    encoder: Encoder, side: str, documents: Sequence[Document], evaluation: EvaluationConfig, counts: dict[str, int]
) -> list[Encoded]:
    """Encode documents of at least two tokens: nothing predicts the first one."""
    limit = min(evaluation.membership_tokens, encoder.max_length)
    encoded = [encoder.encode_text(document.text, limit) for document in documents]
    kept = [row for row in encoded if row.labels > 0]
    if documents and not kept:
        raise InputError(f"{side} has no document of two tokens", "nothing predicts the first one", "")
    counts["left_out_documents"] += len(encoded) - len(kept)
    lengths = (len(encoder.tokenizer(document.text, verbose=False)["input_ids"]) for document in documents)
    counts["cut_documents"] += sum(length > limit for length in lengths)
    return kept
