"""The figures of ORT on a live model; `ort` says what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.data.question_forms import FORMS, FormRow
from llmsurgery.data.records import Row
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.encode import EvaluationData
from llmsurgery.evaluate.figures import Measurement
from llmsurgery.evaluate.intervals import Draw, Figure, mean_figure, resampled_interval
from llmsurgery.evaluate.likelihood import answer_probability, score_rows
from llmsurgery.evaluate.suites.ort import OrtConfig

Numbers = npt.NDArray[np.float64]

GAP = "ort.form_gap"

WRAPPERS = {
    "qa": "Please briefly answer the following question.\n",
    "cloze": "Please complete the blank in the following question.\n",
    "mcq": "Please answer the following multiple choice question. "
    "Just provide the letter of the correct answer.\n",
}  # fmt: skip
"""Form -> what stands before the question; a spelled question has that of qa or cloze."""

SPELLINGS = {
    "letters": "Write the answer character by character, each on a new line.\n",
    "example": "Question: What is the capital of Japan?\nAnswer:\nT\no\nk\ny\no\n\n",
}
"""What stands before a question whose answer is to be spelled out."""

DIRECT = "Give the answer directly, without any explanation.\n"


@dataclass(frozen=True)
class OrtEncoding:
    """ORT as the tokens of one model.

    Attributes:
        cells: "forget_qa" and so on -> prompts with their answers.
        shortened: The same -> prompts that lost their first tokens.
        config: Settled settings of the suite.
    """

    cells: Mapping[str, Sequence[Encoded]]
    shortened: Mapping[str, int]
    config: OrtConfig

    @property
    def encoded(self) -> Sequence[Encoded]:
        """Everything that the model reads."""
        return [row for rows in self.cells.values() for row in rows]

    def add_to(self, data: EvaluationData) -> None:
        """Add nothing: questions are measured alone."""

    def measure(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        measured: Measurement,
        batch_size: int,
        progress: Progress,
        before: Measurement | None = None,
    ) -> dict[str, Figure]:
        """Return every cell, and the gap to `before`; arguments as for `Encoding.measure`."""
        figures: dict[str, Figure] = {}
        for name, rows in self.cells.items():
            scores = score_rows(model, rows, encoder.pad_id, batch_size, progress, f"scoring {name.replace('_', ' ')}")
            values = np.array([answer_probability(row) for row in scores])
            measured.samples[f"ort.{name}"] = values
            shown = {"mean": "geometric per token", "shortened_prompts": self.shortened[name]}
            figures[f"ort.{name}"] = mean_figure(values.tolist(), shown)
        now, then = (_forget(one.samples) for one in (measured, measured if before is None else before))
        return {**figures, GAP: gap_figure(then, now)}


def _forget(samples: Mapping[str, Numbers]) -> dict[str, Numbers]:
    return {form: samples[name] for form in FORMS if (name := f"ort.forget_{form}") in samples}


def gap_figure(before: Mapping[str, Numbers], after: Mapping[str, Numbers]) -> Figure:
    """Return the largest minus the smallest relative drop over forms.

    Args:
        before: Form -> score of each forget row before.
        after: The same after; its rows are resampled together with those before.
    """
    n = sum(map(len, after.values()))
    shown: dict[str, object] = {"forms": len(after), "drops": _drops(before, after, np.arange)}
    if len(after) < 2 or any(part.mean() == 0 for part in before.values()):
        # One form has no gap, and what had no probability cannot drop.
        return Figure(None, n, None, shown)

    def gap(draw: Draw) -> float:
        drops = [drop for drop in _drops(before, after, draw).values() if drop is not None]
        return max(drops) - min(drops)

    interval = resampled_interval(gap) if min(map(len, after.values())) > 1 else None
    return Figure(gap(np.arange), n, interval, shown)


def _drops(before: Mapping[str, Numbers], after: Mapping[str, Numbers], draw: Draw) -> dict[str, float | None]:
    """Return (p_before - p_after) / p_before of every form, None where p_before is 0."""
    found: dict[str, float | None] = {}
    for form, values in after.items():
        rows = draw(len(values))
        earlier = float(before[form][rows].mean())
        found[form] = (earlier - float(values[rows].mean())) / earlier if earlier else None
    return found


def encode_ort(
    encoder: Encoder, rows: Mapping[str, Sequence[FormRow]], config: OrtConfig, evaluation: EvaluationConfig
) -> OrtEncoding:
    """Encode the questions of every cell.

    Args:
        encoder: The model's encoder.
        rows: "forget_qa" and so on -> rows.
        config: Settled settings of the suite.
        evaluation: Settled evaluation settings; `rows` bounds every cell.

    Raises:
        InputError: A prompt or an answer has no token.
    """
    cells: dict[str, list[Encoded]] = {}
    shortened = dict.fromkeys(rows, 0)
    for name, members in rows.items():
        form = name.partition("_")[2]
        cells[name] = []
        for row in members[: evaluation.rows or None]:
            found, lost = encoder.encode_continuation(
                prompt_text(encoder, row, form, config), answer_text(row, form), None, row.where
            )
            cells[name].append(found)
            shortened[name] += lost > 0
    return OrtEncoding(cells, shortened, config)


def user_turn(row: FormRow, form: str, config: OrtConfig) -> str:
    """Return what the user says."""
    spelled = form == "spelled"
    wrapper = WRAPPERS[("cloze" if row.blank else "qa") if spelled else form]
    lead = (DIRECT if config.direct else "") + (SPELLINGS[config.spelling] if spelled else "")
    return f"{lead}{wrapper}Question: {row.question.strip()}\n"


def prompt_text(encoder: Encoder, row: FormRow, form: str, config: OrtConfig) -> str:
    """Return the prompt that an answer follows: the user's turn in the chat template, then "Answer:"."""
    turn = user_turn(row, form, config)
    if encoder.tokenizer.chat_template:
        turn = encoder.prompt_text(Row("qa", turn, "", where=row.where))
    return turn + ("Answer:\n" if form == "spelled" else "Answer:")


def answer_text(row: FormRow, form: str) -> str:
    """Return what follows the prompt: the answer after a blank, or its characters one a line."""
    return "\n".join("".join(row.answer.split())) if form == "spelled" else f" {row.answer}"
