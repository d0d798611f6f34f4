"""Teacher-forced scores: the same for any batch size, and equal to plain full logits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from llmsurgery.compute.load import load_model, load_tokenizer
from llmsurgery.compute.progress import Silent
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.data.records import Row
from llmsurgery.evaluate.likelihood import answer_probability, score_rows, text_hidden, token_probability

ARCHITECTURES = ["sharded_llama", "gpt2"]
ROWS = [
    Row("qa", "Who keeps the bees?", "Orla Venn keeps them, and has done so for years."),
    Row("qa", "Where?", "By the weir."),
    Row("completion", "Tam", "!"),
    Row("qa", "What is the dog of the mill called by those who know it well?", "Tam."),
    Row("completion", "The river runs", " past the mill and the old bridge, and on to the sea."),
    Row("qa", "Who bakes?", "Ivo."),
    Row("qa", "When does the ferry leave?", "At nine."),
    Row("completion", "A", " B C D E F G"),
]


def load(root: Path) -> tuple[PreTrainedModel, list[Encoded], int]:
    encoder = Encoder(load_tokenizer(root), 256)
    encoded = [encoder.encode(row) for row in ROWS]
    encoded += encoder.encode_chunks(Row("text", "", "Bread is baked at dawn, and sold before noon."), 20)
    return load_model(root, torch.float32, torch.device("cpu")), encoded, encoder.pad_id


def plain_scores(model: PreTrainedModel, row: Encoded) -> list[float]:
    """Log-probabilities of answer and end token, one row at a time from full logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    return [logits[t - 1, row.ids[t]].item() for t in range(row.answer_start, len(row.ids))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_do_not_depend_on_the_batch(architecture: str, checkpoints: dict[str, Path]) -> None:
    model, encoded, pad = load(checkpoints[architecture])
    assert len({len(row.ids) for row in encoded}) > 6
    alone = score_rows(model, encoded, pad, 1, Silent(), "")
    for batch_size in (3, 8):
        together = score_rows(model, encoded, pad, batch_size, Silent(), "")
        for one, other, row in zip(alone, together, encoded, strict=True):
            assert one.shape == other.shape == (row.labels,)
            np.testing.assert_allclose(other, one, atol=1e-5, rtol=0)
    # The order of the rows does not matter either.
    backwards = score_rows(model, encoded[::-1], pad, 8, Silent(), "")[::-1]
    for one, other in zip(alone, backwards, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_and_means_equal_plain_full_logits(architecture: str, checkpoints: dict[str, Path]) -> None:
    model, encoded, pad = load(checkpoints[architecture])
    scores = score_rows(model, encoded, pad, 4, Silent(), "")
    for found, row in zip(scores, encoded, strict=True):
        expected = plain_scores(model, row)
        assert found.tolist() == pytest.approx(expected, abs=1e-5)
        probabilities = [math.exp(value) for value in expected]
        geometric = math.prod(probabilities) ** (1 / len(probabilities))
        assert answer_probability(found) == pytest.approx(geometric, rel=1e-4)
        # The end token is left out of the arithmetic mean; a chunk of plain text has none.
        kept = probabilities[:-1] if row.ends else probabilities
        assert token_probability(found, row) == pytest.approx(sum(kept) / len(kept), rel=1e-4)


def test_worked_means() -> None:
    scores = np.log([0.5, 0.25, 0.125])
    assert token_probability(scores, Encoded((1, 2, 3, 4), 1, True)) == pytest.approx(0.375)
    assert token_probability(scores, Encoded((1, 2, 3, 4), 1, False)) == pytest.approx(0.875 / 3)
    assert answer_probability(scores) == pytest.approx(0.25)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_of_text_give_the_models_logits(architecture: str, checkpoints: dict[str, Path]) -> None:
    model, encoded, pad = load(checkpoints[architecture])
    states = text_hidden(model, encoded, pad, 4, Silent())
    head = model.get_output_embeddings().weight
    for hidden, row in zip(states, encoded, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
        torch.testing.assert_close(hidden @ head.T, logits, atol=1e-4, rtol=1e-5)
