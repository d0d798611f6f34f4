"""The figures before and after an operation: what is measured on a live model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from llmsurgery.compute.head import Head, label_log_probabilities, read_head
from llmsurgery.compute.position_invariant import require_supported
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.stream import StreamedModel, in_memory
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.evaluate.aggregate import aggregate
from llmsurgery.evaluate.config import EvaluationConfig, settle
from llmsurgery.evaluate.encode import EvaluationData
from llmsurgery.evaluate.intervals import Figure, ratio_figure
from llmsurgery.evaluate.letters import letter_figures, letter_prob_figure, score_letters
from llmsurgery.evaluate.likelihood import text_hidden, text_kl
from llmsurgery.evaluate.listings import listing_figures
from llmsurgery.evaluate.measure_sets import score_sets
from llmsurgery.evaluate.recovery import Recovery
from llmsurgery.evaluate.redirection import RedirectReference
from llmsurgery.evaluate.scores import SetScores
from llmsurgery.evaluate.stereotypes import stereotype_figure


@dataclass(frozen=True)
class TextReference:
    """The source model's distributions on the plain text, for `utility.kl` and `utility.ppl_ratio`."""

    ids: list[tuple[int, ...]]
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
        scores: Set name -> numbers per row behind the figures.
        retained: The same of a model that never saw the forget rows, if there is one.
        samples: Metric name -> numbers per row behind a suite's figures, for the comparison with another model.
        redirected: What the source does with the probes of a redirection, if there is one.
        recovery: Measures against the aligned model, in a recovery.
    """

    figures: dict[str, Figure]
    answers: dict[str, list[str]] = field(default_factory=dict)
    reference: TextReference | None = None
    scores: Mapping[str, SetScores] = field(default_factory=dict)
    retained: Mapping[str, SetScores] | None = None
    samples: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    redirected: RedirectReference | None = None
    recovery: Recovery | None = None


def measure(
    model: PreTrainedModel | StreamedModel,
    encoder: Encoder,
    data: EvaluationData,
    config: EvaluationConfig,
    progress: Progress,
    reference: TextReference | None = None,
    keep_reference: bool = False,
    retained: Mapping[str, SetScores] | None = None,
) -> Measurement:
    """Measure a model.

    Args:
        model: A causal language model in eval mode, loaded or streamed.
        encoder: Its encoder.
        data: Encoded data.
        config: Evaluation settings.
        progress: Told of every batch.
        reference: The source's distributions; adds `utility.kl` and `utility.ppl_ratio`.
        keep_reference: Return this model's distributions on the text.
        retained: Scores of a model that never saw the forget rows; adds `forget.quality`.

    Returns:
        The figures that the data allows.

    Raises:
        UnsupportedError: Position-invariant inference is asked for, and the model's positions are not rotary.
    """
    config = settle(config)
    if data.listings is not None:
        require_supported(in_memory(model))
    scores, answers = score_sets(model, encoder, data, config, progress)
    figures = _measure_bias(model, encoder, data, config, progress) | aggregate(scores, config, retained)
    kept: TextReference | None = None
    if data.domain:
        losses = _text_losses(model, encoder, data.domain, config, progress)[1]
        answers_alone = [loss[-row.labels :] for loss, row in zip(losses, data.domain, strict=True)]
        figures["domain.ppl"] = ratio_figure(answers_alone, transform=True)
    if data.texts:
        kept = _measure_text(model, encoder, data, config, progress, figures, reference, keep_reference)
    return Measurement(figures, answers, kept, scores, retained)


def _measure_bias(
    model: PreTrainedModel | StreamedModel,
    encoder: Encoder,
    data: EvaluationData,
    config: EvaluationConfig,
    progress: Progress,
) -> dict[str, Figure]:
    """Return the figures of answer letters and of stereotypes."""
    plain, figures = in_memory(model), dict[str, Figure]()
    options = (encoder.pad_id, config.batch_size, progress)
    if data.letters is not None:
        figures |= letter_figures(score_letters(plain, data.letters, *options), data.letters)
    if data.listings is not None:
        figures |= listing_figures(plain, data.listings, *options)
    if data.stereotypes is not None:
        figures["bias.stereotype_rate"] = stereotype_figure(plain, data.stereotypes, *options)
    return figures


def _measure_text(
    model: PreTrainedModel | StreamedModel,
    encoder: Encoder,
    data: EvaluationData,
    config: EvaluationConfig,
    progress: Progress,
    figures: dict[str, Figure],
    reference: TextReference | None,
    keep: bool,
) -> TextReference | None:
    texts = data.texts
    hidden, losses = _text_losses(model, encoder, texts, config, progress)
    head = read_head(in_memory(model))
    if data.letters is not None:
        figures["mcq.letter_prob"] = letter_prob_figure(hidden, head, texts, data.letters, encoder)
    figures["utility.ppl"] = perplexity = ratio_figure(losses, transform=True)
    if reference is not None:
        ratio = perplexity.number / reference.perplexity
        figures["utility.ppl_ratio"] = Figure(ratio, perplexity.n, None)
        figures["utility.kl"] = ratio_figure(text_kl(reference.hidden, hidden, reference.head, model))
    else:
        figures["utility.ppl_ratio"] = Figure(1.0, perplexity.n, None)
        figures["utility.kl"] = Figure(0.0, perplexity.n, None)
    if not keep:
        return None
    # A copy: the head may be one of the weights that the operation changes in place.
    return TextReference([text.ids for text in texts], hidden, head.clone(), perplexity.number)


def _text_losses(
    model: PreTrainedModel | StreamedModel,
    encoder: Encoder,
    texts: list[Encoded],
    config: EvaluationConfig,
    progress: Progress,
) -> tuple[list[torch.Tensor], list[npt.NDArray[np.float64]]]:
    """Return the final hidden states of every text, and the negative log-probabilities of its tokens, in nats."""
    hidden = text_hidden(model, texts, encoder.pad_id, config.batch_size, progress)
    head = read_head(in_memory(model))
    losses = []
    with torch.inference_mode():
        for states, text in zip(hidden, texts, strict=True):
            labels = torch.tensor(text.ids[1:], device=states.device)
            losses.append(-label_log_probabilities(states, head, labels).double().cpu().numpy())
    return hidden, losses
