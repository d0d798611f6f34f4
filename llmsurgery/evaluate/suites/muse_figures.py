"""The figures of MUSE on a live model; `muse` says what they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.data.records import Row
from llmsurgery.errors import InputError
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.encode import EvaluationData, encode_whole
from llmsurgery.evaluate.figures import Measurement
from llmsurgery.evaluate.formulas import privacy_leakage
from llmsurgery.evaluate.generation import greedy_answers, rouge_l
from llmsurgery.evaluate.intervals import Figure, mean_figure
from llmsurgery.evaluate.measure_sets import CONTINUATION_TOKENS, KNOWLEDGE_TOKENS, until_stop
from llmsurgery.evaluate.suites.muse import REFERENCES, MuseConfig

_AUC = "forget.min_k_auc"


@dataclass(frozen=True)
class Task:
    """Prompts that are answered and compared.

    Attributes:
        name: Name of the figure.
        prompts: Prompts as tokens.
        references: What the answers are compared with.
        new_tokens: New tokens at most.
        cut: End an answer at the next question or blank line.
        shortened: Prompts that lost their first tokens.
    """

    name: str
    prompts: Sequence[Encoded]
    references: Sequence[str]
    new_tokens: int
    cut: bool
    shortened: int


@dataclass(frozen=True)
class MuseEncoding:
    """MUSE as the tokens of one model.

    Attributes:
        tasks: VerbMem and both KnowMem.
        whole: "forget" and "holdout" texts of PrivLeak.
        config: Settled settings of the suite.
        evaluation: Settled evaluation settings.
    """

    tasks: Sequence[Task]
    whole: Mapping[str, list[Encoded]]
    config: MuseConfig
    evaluation: EvaluationConfig

    @property
    def encoded(self) -> Sequence[Encoded]:
        """Everything that the model reads."""
        return [row for rows in (*(task.prompts for task in self.tasks), *self.whole.values()) for row in rows]

    def add_to(self, data: EvaluationData) -> None:
        """Let membership be scored with the other data, for a retrained model too."""
        data.whole.update(self.whole)

    def measure(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        measured: Measurement,
        batch_size: int,
        progress: Progress,
        before: Measurement | None = None,
    ) -> dict[str, Figure]:
        """Return the four figures, and the AUC behind the last one; arguments as for `Encoding.measure`."""
        figures = {task.name: self._answer(task, model, encoder, batch_size, progress) for task in self.tasks}
        return figures | leakage_figures(measured.figures[_AUC], self.config.reference or "half")

    def _answer(
        self, task: Task, model: PreTrainedModel, encoder: Encoder, batch_size: int, progress: Progress
    ) -> Figure:
        new_tokens = min(task.new_tokens, self.evaluation.generation_tokens)
        name = f"answering {task.name}"
        found = greedy_answers(model, encoder, task.prompts, new_tokens, batch_size, progress, name, stripped=False)
        answers = [until_stop(answer) if task.cut else answer for answer in found]
        stemming = self.evaluation.protocol == "ou"
        scale = 1 if stemming else 100
        values = rouge_l(task.references, answers, "fmeasure", stemming)
        detail = {"scale": scale, "stemming": stemming, "new_tokens": new_tokens, "shortened_prompts": task.shortened}
        return mean_figure([scale * value for value in values], detail)


def leakage_figures(auc: Figure, reference: str) -> dict[str, Figure]:
    """Return PrivLeak, and the AUC with the same reference in its detail.

    Args:
        auc: `forget.min_k_auc`; its `reference_auc` is that of the retrained model if there is one.
        reference: Where A_ref is from: a key of `REFERENCES`, or "retrained".

    Returns:
        `muse.privleak` with an interval over texts, A_ref taken as exact, and `forget.min_k_auc`.
    """
    against = 1 - REFERENCES[reference] if reference in REFERENCES else float(str(auc.detail["reference_auc"]))
    value = privacy_leakage(auc.number, against)
    interval = None
    if auc.interval is not None and not math.isnan(value):
        # A = 1 - AUC: the upper end of one is the lower end of the other.
        interval = (privacy_leakage(auc.interval[1], against), privacy_leakage(auc.interval[0], against))
    detail = {"a": 1 - auc.number, "a_ref": 1 - against, "reference": reference, "min_k": auc.detail["min_k"]}
    leakage = Figure(None if math.isnan(value) else value, auc.n, interval, detail)
    return {
        "muse.privleak": leakage,
        _AUC: replace(auc, detail={**auc.detail, "reference_auc": against, "privacy_leakage": leakage.value}),
    }


def encode_muse(
    encoder: Encoder, rows: Mapping[str, Sequence[Row]], config: MuseConfig, evaluation: EvaluationConfig
) -> MuseEncoding:
    """Encode the rows of every figure.

    Args:
        encoder: The model's encoder.
        rows: Name of the file -> rows.
        config: Settled settings of the suite.
        evaluation: Settled evaluation settings; `rows` bounds every set, `generation_rows` those that are answered.

    Raises:
        InputError: A prompt or an answer has no token, or no text has two.
    """
    bounds = [bound for bound in (evaluation.rows, evaluation.generation_rows) if bound]
    answered = min(bounds) if bounds else None
    tasks = [_continuations(encoder, rows["verbmem"][:answered], evaluation)]
    for side, name in (("forget", "muse.knowmem_f"), ("retain", "muse.knowmem_r")):
        examples = "".join(
            f"Question: {row.prompt}\nAnswer: {row.answer}\n\n" for row in rows[f"knowmem_{side}_examples"]
        )
        tasks.append(_questions(encoder, name, examples, rows[f"knowmem_{side}"][:answered]))
    whole = {
        side: encode_whole(encoder, rows[f"privleak_{side}"][: evaluation.rows or None], evaluation)
        for side in ("forget", "holdout")
    }
    for side, texts in whole.items():
        if not texts:
            raise InputError(f"privleak/{side} has no text of two tokens", "nothing predicts the first one", "")
    return MuseEncoding(tasks, whole, config, evaluation)


def _continuations(encoder: Encoder, rows: Sequence[Row], evaluation: EvaluationConfig) -> Task:
    whole = evaluation.protocol == "ou"
    pairs = [(row.prompt, row.answer) for row in rows]
    prompts, cut, shortened = _encode(encoder, pairs, rows, CONTINUATION_TOKENS)
    references = [row.answer for row in rows] if whole else cut
    return Task("muse.verbmem_f", prompts, references, CONTINUATION_TOKENS, False, shortened)


def _questions(encoder: Encoder, name: str, examples: str, rows: Sequence[Row]) -> Task:
    pairs = [(f"{examples}Question: {row.prompt}\nAnswer: ", row.answer) for row in rows]
    prompts, _, shortened = _encode(encoder, pairs, rows, KNOWLEDGE_TOKENS)
    return Task(name, prompts, [row.answer for row in rows], KNOWLEDGE_TOKENS, True, shortened)


def _encode(
    encoder: Encoder, pairs: Sequence[tuple[str, str]], rows: Sequence[Row], tokens: int
) -> tuple[list[Encoded], list[str], int]:
    """Return prompts, the first tokens of what follows them as text, and how many prompts were shortened."""
    prompts, texts, shortened = [], [], 0
    for (prompt, answer), row in zip(pairs, rows, strict=True):
        found, dropped = encoder.encode_continuation(prompt, answer, tokens, row.where)
        prompts.append(Encoded(found.ids[: found.answer_start], found.answer_start, False, row.where))
        texts.append(encoder.answer_text(found))
        shortened += dropped > 0
    return prompts, texts, shortened
