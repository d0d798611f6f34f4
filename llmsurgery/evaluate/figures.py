"""The figures before and after an operation: value, number of rows, bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from llmsurgery.compute.head import Head, label_log_probabilities, read_head
from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import CHUNK_TOKENS, Encoded, Encoder
from llmsurgery.data.records import Row
from llmsurgery.errors import InputError
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.generation import greedy_answers, rouge_l_recall
from llmsurgery.evaluate.likelihood import answer_probability, score_rows, text_hidden, text_kl, token_probability


@dataclass(frozen=True)
class Figure:
    """One measured metric.

    Attributes:
        value: The value.
        n: Rows it was measured on.
        interval: 95% percentile bootstrap interval over rows, None where it makes no sense.
    """

    value: float
    n: int
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class TextReference:
    """The source model's distributions on the plain text, for `utility.kl` and `utility.ppl_ratio`."""

    hidden: list[torch.Tensor]
    head: Head
    perplexity: float


@dataclass(frozen=True)
class Measurement:
    """Figures of one model, and what is needed to compare another with it.

    Attributes:
        figures: Metric name -> figure.
        answers: Set name ("forget", "retain") -> greedy answers of its first rows.
        reference: Present if plain text was measured.
    """

    figures: dict[str, Figure]
    answers: dict[str, list[str]] = field(default_factory=dict)
    reference: TextReference | None = None


@dataclass(frozen=True)
class EvaluationData:
    """Encoded data sets; encoding once keeps before and after on the same tokens.

    Attributes:
        rows: Set name -> rows ("forget", "retain").
        encoded: Set name -> encoded rows.
        texts: Encoded plain texts.
        skipped: Set name -> passages too short to be cut into prompt and answer.
    """

    rows: dict[str, list[Row]]
    encoded: dict[str, list[Encoded]]
    texts: list[Encoded]
    skipped: dict[str, int] = field(default_factory=dict)

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
    rows: dict[str, list[Row]] = {}
    encoded: dict[str, list[Encoded]] = {}
    skipped: dict[str, int] = {}
    for name, members in sets.items():
        rows[name], encoded[name] = [], []
        for row in members:
            parts = encoder.encode_chunks(row, chunk_tokens) if row.kind == "text" else [encoder.encode(row)]
            rows[name] += [row] * len(parts)
            encoded[name] += parts
            if not parts:
                skipped[name] = skipped.get(name, 0) + 1
        if not encoded[name]:
            raise InputError(f"every passage of --{name} has fewer than four tokens", "nothing can be measured", "")
    chosen = (encoder.encode_text(row.answer, config.text_tokens) for row in texts)
    usable = list(islice((text for text in chosen if len(text.ids) > 8), config.text_rows))
    if texts and not usable:
        raise InputError("no text has more than 8 tokens", "perplexity needs longer passages", "give another --text")
    return EvaluationData(rows, encoded, usable, skipped)


def bootstrap_interval(
    numerators: Sequence[float], denominators: Sequence[float] | None = None, resamples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95% percentile bootstrap interval over rows of a mean, or of a ratio of sums.

    Args:
        numerators: One number per row.
        denominators: Weights per row; all 1 by default.
        resamples: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        Lower and upper bound, or None for fewer than two rows.
    """
    from scipy.stats import bootstrap

    if len(numerators) < 2:
        return None
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.ones_like(top) if denominators is None else np.asarray(denominators, dtype=np.float64)
    result = bootstrap(
        (top, bottom),
        lambda first, second, axis: first.sum(axis=axis) / second.sum(axis=axis),
        n_resamples=resamples,
        method="percentile",
        paired=True,
        vectorized=True,
        random_state=seed,
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _mean_figure(values: Sequence[float]) -> Figure:
    return Figure(float(np.mean(values)), len(values), bootstrap_interval(values))


def _ratio_figure(rows: Sequence[npt.NDArray[np.float64]], transform: bool = False) -> Figure:
    """Mean over all tokens of all rows, resampled by row; exp of it for perplexity."""
    sums, counts = [float(row.sum()) for row in rows], [len(row) for row in rows]
    value, interval = sum(sums) / sum(counts), bootstrap_interval(sums, counts)
    if transform:
        with np.errstate(over="ignore"):
            value = float(np.exp(value))
            interval = None if interval is None else (float(np.exp(interval[0])), float(np.exp(interval[1])))
    return Figure(value, len(rows), interval)


def measure(
    model: PreTrainedModel,
    encoder: Encoder,
    data: EvaluationData,
    config: EvaluationConfig,
    progress: Progress,
    reference: TextReference | None = None,
    keep_reference: bool = False,
) -> Measurement:
    """Measure a model.

    Args:
        model: A causal language model in eval mode.
        encoder: Its encoder.
        data: Encoded data.
        config: Evaluation settings.
        progress: Told of every batch.
        reference: The source's distributions; adds `utility.kl` and `utility.ppl_ratio`.
        keep_reference: Return this model's distributions on the text.

    Returns:
        The figures that the data allows.
    """
    figures: dict[str, Figure] = {}
    answers: dict[str, list[str]] = {}
    for name, encoded in data.encoded.items():
        scores = score_rows(model, encoded, encoder.pad_id, config.batch_size, progress, f"scoring {name}")
        pairs = list(zip(scores, encoded, strict=True))
        figures[f"{name}.token_prob"] = _mean_figure([token_probability(score, row) for score, row in pairs])
        figures[f"{name}.prob"] = _mean_figure([answer_probability(score) for score in scores])
        if config.generate:
            answers[name], recalls = _generate(model, encoder, data, name, config, progress)
            figures[f"{name}.rouge_l"] = _mean_figure(recalls)
    kept: TextReference | None = None
    if data.texts:
        kept = _measure_text(model, encoder, data.texts, config, progress, figures, reference, keep_reference)
    return Measurement(figures, answers, kept)


def _generate(
    model: PreTrainedModel,
    encoder: Encoder,
    data: EvaluationData,
    name: str,
    config: EvaluationConfig,
    progress: Progress,
) -> tuple[list[str], list[float]]:
    encoded = data.encoded[name][: config.generation_rows]
    longest = max(row.labels for row in encoded)
    prompts = [Encoded(row.ids[: row.answer_start], row.answer_start, False, row.where) for row in encoded]
    new_tokens = min(config.generation_tokens, 2 * longest)
    answers = greedy_answers(model, encoder, prompts, new_tokens, config.batch_size, progress, f"answering {name}")
    references = [encoder.answer_text(row) for row in encoded]
    return answers, rouge_l_recall(references, answers)


def _measure_text(
    model: PreTrainedModel,
    encoder: Encoder,
    texts: list[Encoded],
    config: EvaluationConfig,
    progress: Progress,
    figures: dict[str, Figure],
    reference: TextReference | None,
    keep: bool,
) -> TextReference | None:
    hidden = text_hidden(model, texts, encoder.pad_id, config.batch_size, progress)
    head = read_head(model)
    losses = []
    with torch.inference_mode():
        for states, text in zip(hidden, texts, strict=True):
            labels = torch.tensor(text.ids[1:], device=states.device)
            losses.append(-label_log_probabilities(states, head, labels).double().cpu().numpy())
    figures["utility.ppl"] = perplexity = _ratio_figure(losses, transform=True)
    if reference is not None:
        ratio = perplexity.value / reference.perplexity
        figures["utility.ppl_ratio"] = Figure(ratio, perplexity.n, None)
        figures["utility.kl"] = _ratio_figure(text_kl(reference.hidden, hidden, reference.head, model))
    else:
        figures["utility.ppl_ratio"] = Figure(1.0, perplexity.n, None)
        figures["utility.kl"] = Figure(0.0, perplexity.n, None)
    if not keep:
        return None
    # A copy: the head may be one of the weights that the operation changes in place.
    return TextReference(hidden, head.clone(), perplexity.value)
