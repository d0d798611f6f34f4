"""The states of texts about different groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import Structure
from llmsurgery.compute.head import final_hidden
from llmsurgery.compute.residual import read_entries
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.data.collate import collate, length_buckets
from llmsurgery.data.contrast import Contrast
from llmsurgery.evaluate.stereotypes import encode_sentence

BATCH_ROWS = 8


@dataclass(frozen=True, eq=False)
class GroupStates:
    """States of texts.

    Attributes:
        states: [n, width].
        labels: A label for each.
        records: Number of the record that each belongs to [n].
        offsets: How many tokens behind the first one that is looked at each stands [n]; 0 for means.
    """

    states: npt.NDArray[np.float64]
    labels: list[str]
    records: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]


@torch.inference_mode()
def read_groups(
    model: PreTrainedModel, structure: Structure, encoder: Encoder, rows: Sequence[Contrast], pool: str, fold: str
) -> GroupStates:
    """Return states of texts with their labels.

    Args:
        model: A causal language model in eval mode.
        structure: Its roles.
        encoder: Its encoder.
        rows: The texts.
        pool: "mean" for one state per text, "tokens" for those of the tokens from the first difference of a pair on.
        fold: "head" for the inputs of the head, else the residual stream after the last block.
    """
    texts: list[Encoded] = []
    owners: list[tuple[int, str, int]] = []
    for number, row in enumerate(rows):
        encoded = [encode_sentence(encoder, text) for text in row.texts]
        start = first_difference(encoded) if len(encoded) == 2 else 1
        for one, label in zip(encoded, row.labels, strict=True):
            texts.append(one)
            owners.append((number, label, min(start, len(one.ids) - 1)))
    found: dict[int, torch.Tensor] = {}
    for indices in length_buckets(texts, BATCH_ROWS):
        batch = collate([texts[i] for i in indices], encoder.pad_id, model.device)
        if fold == "head":
            hidden = final_hidden(model, batch.input_ids, batch.attention_mask)
        else:
            hidden = read_entries(model, structure, batch.input_ids, batch.attention_mask)[-1]
        for place, i in enumerate(indices):
            states = hidden[place, : len(texts[i].ids)].double().cpu()
            # The first token stands for the beginning and is the same in every text.
            found[i] = states[1:].mean(0, keepdim=True) if pool == "mean" else states[owners[i][2] :]
    counts = [len(found[i]) for i in range(len(texts))]
    labels = [owners[i][1] for i, count in enumerate(counts) for _ in range(count)]
    numbers = np.array([owners[i][0] for i, count in enumerate(counts) for _ in range(count)])
    offsets = np.concatenate([np.arange(count) for count in counts])
    return GroupStates(torch.cat([found[i] for i in range(len(texts))]).numpy(), labels, numbers, offsets)


def first_difference(pair: Sequence[Encoded]) -> int:
    """Return the place of the first token in which two texts differ."""
    both = zip(pair[0].ids, pair[1].ids, strict=False)
    shared = next((i for i, (first, second) in enumerate(both) if first != second), None)
    return min(len(one.ids) for one in pair) - 1 if shared is None else shared
