"""One model on the bench: loaded, given up and loaded again, and its knowledge of rows scored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import Structure
from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.data.records import Row
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.encode import EvaluationData
from llmsurgery.evaluate.formulas import extraction_strength, token_accuracy
from llmsurgery.evaluate.generation import greedy_answers, rouge_l
from llmsurgery.evaluate.likelihood import score_rows, score_tokens, token_probability
from llmsurgery.evaluate.scores import PerRow

ReadTensor = Callable[[str], npt.NDArray[np.floating]]


@dataclass
class Bench:
    """What an attack is given: one model and the data.

    Attributes:
        structure: The checkpoint's roles.
        read: Reads a stored tensor of this checkpoint as float32.
        source_read: The same of the model before surgery; for the source itself its own.
        source_names: Names of the tensors that the model before surgery stores.
        encoder: Turns rows into token ids.
        data: Encoded forget rows, retain rows (none without --retain), control rows (none without --control) and
            plain text.
        evaluation: Settled evaluation settings.
        seed: Seed of everything random.
        progress: Told of long work and notices.
        load: Loads the checkpoint anew; nothing is ever written to it.
    """

    structure: Structure
    read: ReadTensor
    source_read: ReadTensor
    source_names: Collection[str]
    encoder: Encoder
    data: EvaluationData
    evaluation: EvaluationConfig
    seed: int
    progress: Progress
    load: Callable[[], PreTrainedModel]
    _model: PreTrainedModel | None = field(default=None, init=False)

    @property
    def model(self) -> PreTrainedModel:
        """The model as stored, in eval mode."""
        if self._model is None:
            self._model = self.load()
        return self._model

    def spoil(self) -> None:
        """Give up a model that was changed in memory; the next use loads it again."""
        self._model = None

    @property
    def forget(self) -> list[Encoded]:
        """The encoded forget rows."""
        return self.data.encoded["forget"]

    @property
    def forget_rows(self) -> list[Row]:
        """The forget rows, one per encoded row."""
        return self.data.rows["forget"]

    @property
    def retain_rows(self) -> list[Row]:
        """The retain rows; none without --retain."""
        return self.data.rows.get("retain", [])

    def score(self, kind: str, rows: Sequence[int] | None = None, autocast: torch.dtype | None = None) -> PerRow:
        """Score forget rows on the model as it is now.

        Args:
            kind: One of `SCORES`.
            rows: Positions of the rows; all by default.
            autocast: Dtype of matrix products if some parameters are wider.

        Returns:
            Row -> score; rows without a score (an answer of the end token alone, no wrong answers) are left out.
        """
        return self._score_set("forget", kind, range(len(self.forget)) if rows is None else rows, autocast)

    def score_control(self, kind: str, autocast: torch.dtype | None = None) -> PerRow:
        """Score the control rows, which the source does not know; nothing without --control."""
        return self._score_set("control", kind, range(len(self.data.encoded.get("control", []))), autocast)

    def utility(self, kind: str, autocast: torch.dtype | None = None) -> float:
        """Return the mean score of the retain rows, or without them the share of plain-text tokens predicted."""
        if retained := self.data.encoded.get("retain"):
            values = self._score_set("retain", kind, range(len(retained)), autocast)
            values = values or self._score_set("retain", "accuracy", range(len(retained)), autocast)
            return float(np.mean(list(values.values())))
        return float(np.mean(list(self._tokens(self.data.texts, "accuracy", autocast).values())))

    def _score_set(
        self, name: str, kind: str, rows: Sequence[int], autocast: torch.dtype | None
    ) -> dict[str, float]:  # fmt: skip
        encoded = [self.data.encoded[name][i] for i in rows]
        if kind == "choice":
            return self._choices(name, rows, autocast)
        if kind == "rouge_l":
            found = dict(enumerate(self._rouge(encoded, autocast)))
        else:
            found = self._tokens(encoded, kind, autocast)
        return {str(rows[i]): value for i, value in found.items()}

    def _tokens(self, encoded: Sequence[Encoded], kind: str, autocast: torch.dtype | None) -> dict[int, float]:
        size, pad = self.evaluation.batch_size, self.encoder.pad_id
        with torch.autocast(self.model.device.type, dtype=autocast, enabled=autocast is not None):
            scores = score_tokens(self.model, encoded, pad, size, self.progress, "scoring the attack")
        released = self.evaluation.protocol == "ou"
        found: dict[int, float] = {}
        for i, (row, one) in enumerate(zip(scores, encoded, strict=True)):
            hits = row.greedy[:-1] if one.ends or released else row.greedy
            if not len(hits):
                continue
            if kind == "token_prob":
                found[i] = token_probability(row.log_probabilities, one)
            elif kind == "accuracy":
                found[i] = token_accuracy(hits)
            else:
                found[i] = extraction_strength(hits, released)
        return found

    def _rouge(self, encoded: Sequence[Encoded], autocast: torch.dtype | None) -> list[float]:
        prompts = [Encoded(row.ids[: row.answer_start], row.answer_start, False, row.where) for row in encoded]
        longest = max((row.labels for row in encoded), default=1)
        limit = min(self.evaluation.generation_tokens, 2 * longest)
        with torch.autocast(self.model.device.type, dtype=autocast, enabled=autocast is not None):
            answers = greedy_answers(
                self.model, self.encoder, prompts, limit, self.evaluation.batch_size, self.progress, "answering"
            )
        return rouge_l([self.encoder.answer_text(row) for row in encoded], answers, "recall", stemming=True)

    def _choices(self, name: str, rows: Sequence[int], autocast: torch.dtype | None) -> dict[str, float]:
        wrong, paraphrased = self.data.wrong.get(name, {}), self.data.paraphrased.get(name, {})
        chosen = [i for i in rows if i in wrong]
        flat = [one for i in chosen for one in (paraphrased.get(i, self.data.encoded[name][i]), *wrong[i])]
        size, pad = self.evaluation.batch_size, self.encoder.pad_id
        scores = score_rows(self.model, flat, pad, size, self.progress, "scoring the attack", autocast)
        means = iter([float(row.mean()) for row in scores])
        result: dict[str, float] = {}
        for i in chosen:
            right, others = next(means), [next(means) for _ in wrong[i]]
            result[str(i)] = float(right > max(others))
        return result


def take_rows(rows: Mapping[str, Sequence[Row]], forget: int, retain: int) -> dict[str, list[Row]]:
    """Return the first rows that attacks look at, of control rows as many as of forget rows; 0 stands for all."""
    limits = {"forget": forget, "retain": retain, "control": forget}
    return {name: list(rows[name][: limit or None]) for name, limit in limits.items() if name in rows}
