"""Teacher-forced scores: log-probabilities of answer tokens and of plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from llmsurgery.compute.head import (
    Head,
    LabelStatistics,
    batch_log_probabilities,
    batch_statistics,
    final_hidden,
    mean_kl,
    read_head,
)
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.stream import StreamedModel, in_memory, run_calls
from llmsurgery.data.chat import Encoded
from llmsurgery.data.collate import Batch, collate, length_buckets

Scores = npt.NDArray[np.float64]
T = TypeVar("T")


def _over_batches(
    model: PreTrainedModel | StreamedModel,
    work: Callable[[Batch], T],
    rows: Sequence[Encoded],
    pad_id: int,
    batch_size: int,
    progress: Progress,
    name: str,
) -> Iterator[tuple[list[int], T]]:
    """Yield the numbers of the rows of each batch, and what `work` returns for it."""
    device = in_memory(model).device
    batches = list(length_buckets(rows, batch_size))

    def call(indices: list[int]) -> Callable[[], T]:
        return lambda: work(collate([rows[i] for i in indices], pad_id, device, indices))

    tokens = [len(indices) * len(rows[indices[0]].ids) for indices in batches]
    sizes = [len(indices) for indices in batches]
    results = run_calls(model, [call(indices) for indices in batches], tokens, sizes, progress, name)
    yield from zip(batches, results, strict=True)


@torch.inference_mode()
def score_rows(
    model: PreTrainedModel | StreamedModel,
    rows: Sequence[Encoded],
    pad_id: int,
    batch_size: int,
    progress: Progress,
    name: str,
    autocast: torch.dtype | None = None,
) -> list[Scores]:
    """Return the log-probability of every labelled token of every row.

    Args:
        model: A causal language model in eval mode; if it is streamed, all batches go through it block by block.
        rows: Encoded rows.
        pad_id: Token id for padding.
        batch_size: Rows per forward.
        progress: Told of every batch, or of every block.
        name: Name of the task in the progress display.
        autocast: Dtype of the matrix products if some parameters are wider.

    Returns:
        One array [labels] per row, in the order of the rows.
    """
    plain = in_memory(model)

    def work(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return batch_log_probabilities(plain, batch.input_ids, batch.attention_mask, batch.label_mask, autocast)

    result: list[Scores] = [np.empty(0)] * len(rows)
    for indices, (scores, owners) in _over_batches(model, work, rows, pad_id, batch_size, progress, name):
        values, owners_list = scores.double().cpu().numpy(), owners.cpu().numpy()
        for position, index in enumerate(indices):
            result[index] = values[owners_list == position]
    return result


@dataclass(frozen=True)
class TokenScores:
    """Scores of the labelled tokens of one row.

    Attributes:
        log_probabilities: log p of every labelled token [labels].
        greedy: Whether the token is the model's first choice, given all tokens before it [labels].
    """

    log_probabilities: Scores
    greedy: npt.NDArray[np.bool_]


@torch.inference_mode()
def score_tokens(
    model: PreTrainedModel | StreamedModel,
    rows: Sequence[Encoded],
    pad_id: int,
    batch_size: int,
    progress: Progress,
    name: str,
) -> list[TokenScores]:
    """Return log-probability and greedy hit of every labelled token of every row; arguments as for `score_rows`."""
    plain = in_memory(model)

    def work(batch: Batch) -> tuple[LabelStatistics, torch.Tensor]:
        return batch_statistics(plain, batch.input_ids, batch.attention_mask, batch.label_mask)

    result = [TokenScores(np.empty(0), np.empty(0, dtype=bool))] * len(rows)
    for indices, (found, owners) in _over_batches(model, work, rows, pad_id, batch_size, progress, name):
        values, hits = found.log_probabilities.double().cpu().numpy(), found.greedy.cpu().numpy()
        owned = owners.cpu().numpy()
        for position, index in enumerate(indices):
            result[index] = TokenScores(values[owned == position], hits[owned == position])
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
    model: PreTrainedModel | StreamedModel,
    rows: Sequence[Encoded],
    pad_id: int,
    batch_size: int,
    progress: Progress,
) -> list[torch.Tensor]:
    """Return the final hidden states of the positions that predict a token, per text [tokens - 1, width].

    They are the cheapest full record of a model's distributions on a text: a head turns them into logits again.
    """
    plain = in_memory(model)

    def work(batch: Batch) -> torch.Tensor:
        return final_hidden(plain, batch.input_ids, batch.attention_mask)

    result: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for indices, hidden in _over_batches(model, work, rows, pad_id, batch_size, progress, "reading text"):
        for position, index in enumerate(indices):
            result[index] = hidden[position, : len(rows[index].ids) - 1].clone()
    return result


@torch.inference_mode()
def text_kl(
    before: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
    before_head: Head,
    model: PreTrainedModel | StreamedModel,
) -> list[Scores]:
    """Return KL(source || model) per predicted position of every text, in nats.

    Args:
        before: Hidden states of the source, from `text_hidden`.
        after: Hidden states of the model on the same texts.
        before_head: The source's head.
        model: The edited model.
    """
    head = read_head(in_memory(model))
    pairs = zip(before, after, strict=True)
    return [mean_kl(first, second, before_head, head).double().cpu().numpy() for first, second in pairs]
