"""Teacher-forced scores: log-probabilities of answer tokens and of plain text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from llmsurgery.compute.head import Head, batch_log_probabilities, final_hidden, mean_kl, read_head
from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import Encoded
from llmsurgery.data.collate import collate, length_buckets

Scores = npt.NDArray[np.float64]


@torch.inference_mode()
def score_rows(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    pad_id: int,
    batch_size: int,
    progress: Progress,
    name: str,
    autocast: torch.dtype | None = None,
) -> list[Scores]:
    """Return the log-probability of every labelled token of every row.

    Args:
        model: A causal language model in eval mode.
        rows: Encoded rows.
        pad_id: Token id for padding.
        batch_size: Rows per forward.
        progress: Told of every batch.
        name: Name of the task in the progress display.
        autocast: Dtype of the matrix products if some parameters are wider.

    Returns:
        One array [labels] per row, in the order of the rows.
    """
    result: list[Scores] = [np.empty(0)] * len(rows)
    with progress.task(name, len(rows)) as tick:
        for indices in length_buckets(rows, batch_size):
            batch = collate([rows[i] for i in indices], pad_id, model.device, indices)
            scores, owners = batch_log_probabilities(
                model, batch.input_ids, batch.attention_mask, batch.label_mask, autocast
            )
            values, owners_list = scores.double().cpu().numpy(), owners.cpu().numpy()
            for position, index in enumerate(indices):
                result[index] = values[owners_list == position]
            tick(len(indices))
    return result


def token_probability(scores: Scores, encoded: Encoded) -> float:
    """Arithmetic mean of the answer tokens' probabilities, end token left out (`forget.token_prob`)."""
    kept = scores[:-1] if encoded.ends else scores
    return float(np.exp(kept).mean())


def answer_probability(scores: Scores) -> float:
    """Geometric mean of the answer tokens' probabilities, end token counted (`forget.prob`, M1)."""
    return float(np.exp(scores.mean()))


@torch.inference_mode()
def text_hidden(
    model: PreTrainedModel, rows: Sequence[Encoded], pad_id: int, batch_size: int, progress: Progress
) -> list[torch.Tensor]:
    """Return the final hidden states of the positions that predict a token, per text [tokens - 1, width].

    They are the cheapest full record of a model's distributions on a text: a head turns them into logits again.
    """
    result: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    with progress.task("reading text", len(rows)) as tick:
        for indices in length_buckets(rows, batch_size):
            batch = collate([rows[i] for i in indices], pad_id, model.device, indices)
            hidden = final_hidden(model, batch.input_ids, batch.attention_mask)
            for position, index in enumerate(indices):
                result[index] = hidden[position, : len(rows[index].ids) - 1].clone()
            tick(len(indices))
    return result


@torch.inference_mode()
def text_kl(
    before: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
    before_head: Head,
    model: PreTrainedModel,
) -> list[Scores]:
    """Return KL(source || model) per predicted position of every text, in nats.

    Args:
        before: Hidden states of the source, from `text_hidden`.
        after: Hidden states of the model on the same texts.
        before_head: The source's head.
        model: The edited model.
    """
    head = read_head(model)
    pairs = zip(before, after, strict=True)
    return [mean_kl(first, second, before_head, head).double().cpu().numpy() for first, second in pairs]
