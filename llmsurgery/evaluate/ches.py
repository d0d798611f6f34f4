"""CHES: how alike the two answers of a preference pair are to a model.

Paper: "Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization", arXiv 2410.08847. With h
the final hidden state (after the last norm, the input of the head) at the position that predicts a token, and S(y) the
sum of h over the tokens of an answer y, its end token among them:

    CHES    = <S(y+), S(y-)> - |S(y+)|^2
    ln-CHES = <S(y+), S(y-)> / (|y+| |y-|) - |S(y+)|^2 / |y+|^2

Higher is worse: preference training on such a pair lowers the likelihood of both answers, and what it goes to may be
the opposite of either. Inner products are nearly always positive, so CHES follows the lengths; ln-CHES does not. Read
with the model before training. A filter for low values keeps odd pairs, such as a refusal beside a compliance.

What differs from the released code (princeton-nlp/unintentional-unalignment): precisely the positions whose next token
is a scored token of the answer count. Its two scripts add no end token and drop the last position, and agree only in
their own pipelines. Sums are kept in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llmsurgery.compute.head import labelled_hidden
from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import Encoded
from llmsurgery.data.collate import collate, length_buckets


@dataclass(frozen=True)
class Similarity:
    """The scores of one pair.

    Attributes:
        ches: <S+, S-> - |S+|^2.
        ln_ches: The same of means in place of sums.
    """

    ches: float
    ln_ches: float


def similarity(chosen: torch.Tensor, rejected: torch.Tensor, chosen_tokens: int, rejected_tokens: int) -> Similarity:
    """Return the scores of one pair.

    Args:
        chosen: S(y+) [width], float64.
        rejected: S(y-) [width], float64.
        chosen_tokens: |y+|.
        rejected_tokens: |y-|.
    """
    inner, square = float(chosen @ rejected), float(chosen @ chosen)
    return Similarity(
        inner - square, inner / (chosen_tokens * rejected_tokens) - square / (chosen_tokens * chosen_tokens)
    )  # fmt: skip


@torch.inference_mode()
def hidden_sums(
    model: PreTrainedModel, rows: Sequence[Encoded], pad_id: int, batch_size: int, progress: Progress
) -> torch.Tensor:
    """Return S of every row: the sum of the final hidden states that predict its labelled tokens.

    Args:
        model: A causal language model in eval mode.
        rows: Encoded rows; their answers are the labelled tokens.
        pad_id: Token id for padding, on the right.
        batch_size: Rows per forward.
        progress: Told of every batch.

    Returns:
        Sums [rows, width], float64, on the CPU.
    """
    sums: list[torch.Tensor | None] = [None] * len(rows)
    with progress.task("reading answers", len(rows)) as tick:
        for part in length_buckets(rows, batch_size):
            batch = collate([rows[i] for i in part], pad_id, model.device)
            hidden, owners, _ = labelled_hidden(model, batch.input_ids, batch.attention_mask, batch.label_mask)
            hidden, owners = hidden.cpu().double(), owners.cpu()
            total = torch.zeros(len(part), hidden.shape[1], dtype=torch.float64).index_add_(0, owners, hidden)
            for place, value in zip(part, total, strict=True):
                sums[place] = value
            tick(len(part))
    return torch.stack([value for value in sums if value is not None])


def kept_pairs(scores: Sequence[float], share: float) -> list[int]:
    """Return the numbers of the pairs with the lowest scores, in the order of the file.

    Args:
        scores: One score per pair.
        share: How many of all are kept, rounded up; of equal scores the first come first.
    """
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return sorted(order[: math.ceil(share * len(scores) - 1e-9)])
