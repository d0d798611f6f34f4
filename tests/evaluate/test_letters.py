"""Figures of answer letters: cyclic orders, recalls, and that a fixed letter is no better than chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmsurgery.compute.head import Head
from llmsurgery.data.chat import Encoder
from llmsurgery.data.choices import Question
from llmsurgery.data.mcq import TEMPLATE, Choices
from llmsurgery.errors import UnsupportedError
from llmsurgery.evaluate.letters import (
    LetterScores,
    encode_letters,
    hits_of,
    letter_figures,
    letter_log_probabilities,
    letter_tokens,
    recall_spread,
)

from ..builders.tokenizer import byte_tokenizer

QUESTIONS = tuple(Question(f"Number {i}?", ("one", "two", "three", "four"), i % 4, f"f:{i}") for i in range(8))
ENCODER = Encoder(byte_tokenizer(), 256)


def test_every_order_is_asked_and_letters_are_found() -> None:
    data = encode_letters(ENCODER, Choices(QUESTIONS, 4, 2), TEMPLATE)
    assert len(data.prompts) == 32
    text = ENCODER.tokenizer.decode(data.prompts[1].ids)
    assert "Number 0?\nA. two\nB. three\nC. four\nD. one\nAnswer with the letter." in text
    assert text.endswith("Answer:")
    # Bytes: a letter behind a blank is two tokens, without one it is one.
    assert [len(each) for each in data.tokens] == [1, 1, 1, 1]
    assert data.skipped == 2


def test_letters_of_several_tokens_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="single tokens") as caught:
        letter_tokens(ENCODER, "Answer:", "A\u00c4")
    assert caught.value.exit_code == 4
    assert caught.value.fix


def test_forms_with_and_without_a_blank_are_summed() -> None:
    head, states = Head(torch.randn(6, 3, generator=torch.Generator().manual_seed(0))), torch.ones(1, 3)
    found = letter_log_probabilities(states, head, ((0, 3), (1, 4)))
    chances = head.logits(states).softmax(-1)[0].double().numpy()
    assert np.exp(found[0]) == pytest.approx([chances[0] + chances[3], chances[1] + chances[4]], rel=1e-5)
    raised = letter_log_probabilities(states, head, ((0, 3), (1, 4)), {0: 2.0, 3: 2.0})[0]
    assert raised[0] - raised[1] == pytest.approx(found[0, 0] - found[0, 1] + 2.0, abs=1e-5)


def test_one_letter_always_is_worth_chance_and_the_largest_spread() -> None:
    data = encode_letters(ENCODER, Choices(QUESTIONS, 4), TEMPLATE)
    always = np.zeros((8, 4, 4))
    always[..., 1] = 1.0
    figures = letter_figures(LetterScores(always), data)
    assert figures["mcq.accuracy"].value == 0.25
    assert figures["mcq.rstd"].value == pytest.approx(100 * np.std([0, 1, 0, 0]))
    assert [figures[f"mcq.recall_{letter}"].value for letter in "abcd"] == [0, 1, 0, 0]
    assert figures["mcq.rstd"].interval == (pytest.approx(43.3, abs=0.1), pytest.approx(43.3, abs=0.1))
    # A model that knows is right in every order.
    known = np.zeros((8, 4, 4))
    for item, answer in enumerate(data.answers):
        for order in range(4):
            known[item, order, (answer - order) % 4] = 1.0
    hits, _ = hits_of(known, data.answers)
    assert hits.mean() == 1.0
    assert recall_spread(hits) == 0.0
