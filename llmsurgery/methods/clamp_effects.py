"""What clamped neurons do to a model: on ordinary text, for other values, and as stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmsurgery.methods.base import Operation

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmsurgery.compute.clamping import Clamp
    from llmsurgery.data.concepts import Concept

SWEEP = (1.0, 2.0, 5.0, 10.0)
QUANTILE = 0.999
TEXTS, TEXT_TOKENS = 8, 64
"""Ordinary text that neurons are measured on."""

ALIKE = 0.02
"""Share of the clamp's own effect that the stored result may differ from the clamped model."""


def ordinary_texts(operation: Operation) -> list[tuple[int, ...]]:
    """Return the ordinary text that neurons are measured on, as token ids."""
    rows = list(operation.data.get("text", ()))[:TEXTS]
    return [operation.encoder.encode_text(row.answer, TEXT_TOKENS).ids for row in rows]


def percentiles(operation: Operation, found: Sequence[Clamp], texts: Sequence[tuple[int, ...]]) -> list[float]:
    """Return the 99.9th percentile of each neuron's absolute value on text.

    Raises:
        InputError: There is no text.
    """
    from llmsurgery.compute.clamping import neuron_percentiles
    from llmsurgery.errors import InputError

    if not texts:
        raise InputError("there is no text", "neurons are measured on it", "give --text")
    return neuron_percentiles(operation.model, found, texts, QUANTILE)


def _log_probabilities(model: PreTrainedModel, texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Return the log-probabilities of all tokens at every position of some texts [positions, vocabulary]."""
    import torch

    with torch.inference_mode():
        found = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float() for ids in texts]
        return torch.cat(found).log_softmax(-1)


def _divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((before.exp() * (before - after)).sum(-1).mean())


def sweep_values(
    operation: Operation,
    found: Sequence[Clamp],
    strengths: Sequence[float | None],
    concepts: Sequence[Concept],
    texts: Sequence[tuple[int, ...]],
) -> list[dict[str, float]]:
    """Return probability of the concepts and KL divergence on text for values of both signs, and for 0."""
    from llmsurgery.compute.clamping import clamped
    from llmsurgery.evaluate.concept import concept_figure

    model, notice = operation.model, operation.progress.notice
    before = _log_probabilities(model, texts[:2])
    rows = [{"value": 0.0}, *({"value": sign * factor} for factor in SWEEP for sign in (1.0, -1.0))]
    with operation.progress.task("sweep", len(rows)) as tick:
        for row in rows:
            held = [clamp.at(row["value"] * (q or 0.0)) for clamp, q in zip(found, strengths, strict=True)]
            with clamped(model, held):
                row["concept.prob"] = concept_figure(model, concepts).number
                row["kl"] = _divergence(before, _log_probabilities(model, texts[:2]))
            tick(1)
    rows.sort(key=lambda row: row["value"])
    told = "; ".join(f"{row['value']:+g}: {row['concept.prob']:.4f}, {row['kl']:.4f}" for row in rows)
    notice(f"value, in percentiles: probability of the concept, KL on text: {told}")
    return rows


def stored_as_clamped(
    operation: Operation, held: Sequence[Clamp], texts: Sequence[tuple[int, ...]]
) -> Callable[[PreTrainedModel], None]:
    """Return the comparison of the stored result, loaded again, with the clamped model."""
    from llmsurgery.compute.clamping import clamped

    before = _log_probabilities(operation.model, texts[:2])
    with clamped(operation.model, held):
        wanted = _log_probabilities(operation.model, texts[:2])
    effect = _divergence(before, wanted)

    def check(result: PreTrainedModel) -> None:
        from llmsurgery.errors import DamagedError

        left = _divergence(wanted, _log_probabilities(result, texts[:2]))
        # Rounding to the stored dtype is all that may differ.
        if left > max(1e-3, ALIKE * effect):
            raise DamagedError(
                f"the stored result is not the clamped model: KL {left:.4g} where the clamp itself makes {effect:.4g}",
                "a bias was dropped when it was loaded, or the stored dtype is too narrow for this value",
                "take a smaller value, or report this with the name of the model",
            )

    return check
