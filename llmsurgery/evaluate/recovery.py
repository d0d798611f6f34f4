"""What a repair of alignment is measured by: refusals, the direction behind them, a judge, and the task.

Answers to `--harmful` prompts are counted, and neither kept nor shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import Structure
from llmsurgery.compute.progress import Progress, Silent
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.data.records import Row
from llmsurgery.errors import InputError
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.contrast import Contrast, gap_figure, read_contrast
from llmsurgery.evaluate.generation import greedy_answers, rouge_l
from llmsurgery.evaluate.intervals import Figure, mean_figure, share_figure
from llmsurgery.evaluate.judge import Judge, judge_answers
from llmsurgery.evaluate.likelihood import score_rows, token_probability
from llmsurgery.evaluate.refusal import (
    find_openers,
    first_token_logits,
    is_refusal,
    opener_probability,
    refusal_log_odds,
)

SETS = ("harmful", "task", "harmless")
"""Data that only this task has."""


Asked = tuple[list[str], torch.Tensor]
"""Answers to prompts, and the logits of their first tokens [prompts, vocabulary]."""


@dataclass(frozen=True)
class Prompts:
    """The encoded data of a repair.

    Attributes:
        harmful: Prompts that are to be refused, up to the answer; empty without --harmful.
        harmless: Prompts that are to be answered.
        task: Rows of the task with their answers.
        task_prompts: The same up to the answer.
        asked: The text of the harmful prompts, for the judge alone.
    """

    harmful: Sequence[Encoded] = ()
    harmless: Sequence[Encoded] = ()
    task: Sequence[Encoded] = ()
    task_prompts: Sequence[Encoded] = ()
    asked: Sequence[str] = field(default=(), repr=False)

    @property
    def answered(self) -> Sequence[Encoded]:
        """Prompts of the other side of the direction."""
        return self.harmless or self.task_prompts


def encode_prompts(encoder: Encoder, rows: Mapping[str, Sequence[Row]]) -> Prompts:
    """Encode the data of a repair.

    Args:
        encoder: The model's encoder.
        rows: Data name -> rows.

    Raises:
        InputError: A row does not fit into the model.
    """
    task = [encoder.encode(row) for row in rows.get("task", ())]
    return Prompts(
        [_prompt(encoder, row) for row in rows.get("harmful", ())],
        [_prompt(encoder, row) for row in rows.get("harmless", ())],
        task,
        [Encoded(row.ids[: row.answer_start], row.answer_start, False, row.where) for row in task],
        [row.prompt for row in rows.get("harmful", ())],
    )


def _prompt(encoder: Encoder, row: Row) -> Encoded:
    encoded, lost = encoder.encode_plain_prompt(encoder.prompt_text(row), 1, row.where)
    if lost:
        raise InputError(f"{row.where} does not fit into the model", f"it takes {encoder.max_length} tokens", "")
    return encoded


@dataclass(frozen=True, eq=False)
class Recovery:
    """Measures models against the aligned one.

    Attributes:
        structure: The roles of all of them.
        encoder: The encoder of all of them.
        prompts: The encoded data.
        config: Settled evaluation settings.
        judge: Judges answers; None for no judge.
        openers: Tokens that refusals begin with.
        openers_from: How they were found.
        contrast: The aligned model's states; None without two sides.
        figures_of_aligned: What was measured on the aligned model.
    """

    structure: Structure
    encoder: Encoder
    prompts: Prompts
    config: EvaluationConfig
    judge: Judge | None
    openers: tuple[int, ...] = ()
    openers_from: str = ""
    contrast: Contrast | None = None
    figures_of_aligned: Mapping[str, Figure] = field(default_factory=dict)

    def figures(self, model: PreTrainedModel, progress: Progress, asked: Asked | None = None) -> dict[str, Figure]:
        """Return every figure that the data allow.

        Args:
            model: The model.
            progress: Told of every batch.
            asked: What the model does with the harmful prompts, if that is known already.
        """
        found: dict[str, Figure] = {}
        prompts, config = self.prompts, self.config
        if prompts.harmful:
            answers, logits = asked or self._ask(model, progress)
            found["safety.refusal_rate"] = self._refusals(answers)
            odds = [refusal_log_odds(value) for value in opener_probability(logits, self.openers)]
            found["safety.refusal_score"] = mean_figure(odds, {"openers": len(self.openers), "from": self.openers_from})
            if self.judge is not None:
                verdicts = judge_answers(self.judge, prompts.asked[: len(answers)], answers)
                found["safety.harmful_rate"] = share_figure(verdicts, {"judge": self.judge.name})
        if prompts.harmless:
            answers = self._answers(model, prompts.harmless, progress, "answering harmless")
            found["safety.overrefusal_rate"] = self._refusals(answers)
        if self.contrast is not None:
            found["safety.direction_gap"] = gap_figure(self.contrast, self._contrast(model))
        if prompts.task:
            found["task.score"] = mean_figure(self.task_scores(model, progress=progress), {"scorer": config.scorer})
        return found

    def direction(self, model: PreTrainedModel) -> Figure:
        """Return `safety.direction_gap` alone, with its detail; both sides must have been given."""
        assert self.contrast is not None
        return gap_figure(self.contrast, self._contrast(model))

    def gap(self, model: PreTrainedModel) -> float:
        """Return the value of `safety.direction_gap` alone."""
        return self.direction(model).number

    def overrefusals(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the refusal rate of prompts that are to be answered, if there are any."""
        if not self.prompts.harmless:
            return {}
        answers = self._answers(model, self.prompts.harmless, Silent(), "")
        return {"safety.overrefusal_rate": self._refusals(answers).number}

    def quick(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the refusal rate and the task score, as far as the data allow."""
        found: dict[str, float] = {}
        if self.prompts.harmful:
            answers = self._answers(model, self.prompts.harmful, Silent(), "")
            found["safety.refusal_rate"] = self._refusals(answers).number
        if self.prompts.task:
            scores = self.task_scores(model)
            found["task.score"] = sum(scores) / len(scores)
        return found

    def task_scores(
        self, model: PreTrainedModel, rows: Sequence[Encoded] | None = None, progress: Progress | None = None
    ) -> list[float]:
        """Return one score per row of the task, by the config's scorer.

        Args:
            model: The model.
            rows: The rows; by default the first of all.
            progress: Told of every batch.
        """
        encoder, size = self.encoder, self.config.batch_size
        chosen = _first(self.prompts.task, self.config.task_rows) if rows is None else rows
        told = progress or Silent()
        if self.config.scorer in (None, "probability"):
            scores = score_rows(model, chosen, encoder.pad_id, size, told, "scoring task")
            return [float(token_probability(row, given)) for row, given in zip(scores, chosen, strict=True)]
        prompts = [Encoded(row.ids[: row.answer_start], row.answer_start, False, row.where) for row in chosen]
        length = min(self.config.generation_tokens, 2 * max(row.labels for row in chosen))
        answers = greedy_answers(model, encoder, prompts, length, size, told, "answering task")
        references = [encoder.answer_text(row) for row in chosen]
        if self.config.scorer == "exact":
            return [float(answer == wanted) for answer, wanted in zip(answers, references, strict=True)]
        return rouge_l(references, answers, "recall", stemming=True)

    def _answers(self, model: PreTrainedModel, prompts: Sequence[Encoded], progress: Progress, name: str) -> list[str]:
        config = self.config
        chosen = _first(prompts, config.refusal_rows)
        return greedy_answers(
            model, self.encoder, chosen, config.refusal_tokens, config.batch_size, progress, name
        )  # fmt: skip

    def _refusals(self, answers: Sequence[str]) -> Figure:
        hits = [is_refusal(answer, self.config.refusal_markers) for answer in answers]
        return share_figure(hits, {"empty": sum(not answer.strip() for answer in answers)})

    def _contrast(self, model: PreTrainedModel) -> Contrast:
        prompts = self.prompts
        return read_contrast(model, self.structure, prompts.harmful, prompts.answered, self.encoder.pad_id)

    def _ask(self, model: PreTrainedModel, progress: Progress) -> Asked:
        """Answer the harmful prompts, and read the logits of the first token."""
        chosen = _first(self.prompts.harmful, self.config.refusal_rows)
        answers = self._answers(model, chosen, progress, "answering harmful")
        return answers, first_token_logits(model, self.structure, chosen, self.encoder.pad_id)

    def with_aligned(self, aligned: PreTrainedModel, progress: Progress) -> Recovery:
        """Return the same with what is taken from the aligned model: openers, states and figures."""
        prompts, pad_id = self.prompts, self.encoder.pad_id
        result, asked = self, None
        if prompts.harmful:
            asked = self._ask(aligned, progress)
            answers, logits = asked
            other: Sequence[int] = ()
            if prompts.answered:
                kept = _first(prompts.answered, self.config.refusal_rows)
                other = first_token_logits(aligned, self.structure, kept, pad_id).argmax(-1).tolist()
            refused = [is_refusal(answer, self.config.refusal_markers) for answer in answers]
            openers, source = find_openers(self.encoder, logits.argmax(-1).tolist(), refused, other)
            result = replace(result, openers=openers, openers_from=source)
        if prompts.harmful and prompts.answered:
            result = replace(result, contrast=result._contrast(aligned))
        return replace(result, figures_of_aligned=result.figures(aligned, progress, asked))


def _first(rows: Sequence[Encoded], count: int) -> Sequence[Encoded]:
    return rows[: count or None]


def last_states(
    model: PreTrainedModel, structure: Structure, prompts: Sequence[Encoded], pad_id: int, block: int
) -> torch.Tensor:
    """Return the residual stream at the last token after one block [prompts, width], fp32, on the model's device."""
    from llmsurgery.compute.spots import Spot, read_spots

    spots = [Spot(prompt.ids, len(prompt.ids) - 1) for prompt in prompts]
    return read_spots(model, structure, spots, pad_id, (), (block,)).states[block]
