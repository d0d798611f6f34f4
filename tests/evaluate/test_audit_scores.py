"""Scores of preference data: the worked numbers, and what must hold on a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmsurgery.compute.load import load_model, load_tokenizer
from llmsurgery.compute.progress import Silent
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.data.records import Row
from llmsurgery.evaluate.bci import UNSEEN, kept_weight, read_reference, score_spans, surprisals, window_hashes
from llmsurgery.evaluate.ches import hidden_sums, kept_pairs, similarity
from llmsurgery.evaluate.edit_distance import edit_distance

THE, CAT, ZZZ, OTHER = range(4)


def test_ches_of_the_worked_example() -> None:
    chosen = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64).sum(0)
    rejected = torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=torch.float64).sum(0)
    found = similarity(chosen, rejected, 3, 2)
    assert found.ches == -4
    # The other sign: lengths are divided out.
    assert found.ln_ches == pytest.approx(0.0555556, abs=1e-7)


def test_the_filter_keeps_the_lowest_share() -> None:
    assert kept_pairs([3.0, 1.0, 2.0, 1.0], 0.5) == [1, 3]
    assert kept_pairs([3.0, 1.0, 2.0, 1.0], 0.01) == [1]
    # 19 of about 370, as in the paper.
    assert len(kept_pairs([float(i) for i in range(370)], 0.05)) == 19
    assert len(kept_pairs([float(i) for i in range(380)], 0.05)) == 19


def test_bci_of_the_worked_example() -> None:
    surprisal = surprisals(np.array([500, 250, 1, 249, 0]))
    assert surprisal[[THE, CAT]].sum() == pytest.approx(2.079442, abs=1e-6)
    assert surprisal[[THE, ZZZ]].sum() == pytest.approx(7.600902, abs=1e-6)
    assert surprisal[4] == pytest.approx(20.723266, abs=1e-6) == -np.log(UNSEEN)


def test_spans_that_the_reference_holds_a_few_times_are_candidates() -> None:
    # CAT ZZZ occurs once, THE CAT four times, ZZZ THE never.
    corpus = [[THE, CAT, THE, CAT, OTHER], [THE, CAT], [OTHER, THE, CAT, ZZZ]]
    answers = [[THE, CAT, ZZZ, THE], [THE]]
    reference = read_reference(iter(corpus), answers, 2, 5)
    assert (reference.tokens, reference.passages) == (11, 3)
    assert reference.found(np.array(answers[0]), 2).tolist() == [4, 1, 0]
    found = score_spans(answers[0], reference, 2, most_found=3)
    assert (found.tokens, found.windows, found.candidates, found.start, found.found) == (4, 3, 1, 1, 1)
    assert found.highest == pytest.approx(-np.log(4 / 11) - np.log(1 / 11))
    assert found.density == pytest.approx(-(2 * np.log(4 / 11) + np.log(4 / 11) + np.log(1 / 11)) / 4)
    assert score_spans(answers[0], reference, 2, most_found=0).candidates == 2
    # What the reference does not hold counts on demand; a token that it never saw passes any usual tau.
    every = score_spans([ZZZ, 4], reference, 2, 3, every=True)
    assert every.highest == pytest.approx(np.log(11) + 20.723266, abs=1e-5)
    # An answer shorter than a window has none.
    short = score_spans(answers[1], reference, 2, 3)
    assert (short.windows, short.highest) == (0, None)


def test_hashes_tell_windows_apart_by_tokens_and_order() -> None:
    hashes = window_hashes(np.array([1, 2, 1, 2, 3]), 2)
    assert hashes[0] == hashes[2]
    assert len(set(hashes.tolist())) == 3
    assert window_hashes(np.array([1]), 2).tolist() == []


def test_weights_of_flagged_rows() -> None:
    assert [kept_weight(value, 20.0) for value in (None, 20.0, 30.0, 50.0)] == [1.0, 1.0, 0.5, 0.0]


def test_edit_distance() -> None:
    for first, second, far in (("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0)):
        assert edit_distance([*first.encode()], [*second.encode()]) == far
    assert edit_distance([*b"abcd"], [*b"bcda"]) == 2


def test_sums_are_those_of_the_states_before_scored_tokens_in_any_batch(checkpoints: dict[str, Path]) -> None:
    root = checkpoints["tied_llama"]
    model = load_model(root, torch.float32, torch.device("cpu"))
    encoder = Encoder(load_tokenizer(root), 256)
    answers = ["Tam.", "I cannot say.", "No, it is by the weir, they say."]
    rows = [encoder.encode(Row("qa", "Who keeps the bees?", "x"), answer) for answer in answers]
    sums = hidden_sums(model, rows, encoder.pad_id, 1, Silent())
    together = hidden_sums(model, rows, encoder.pad_id, 4, Silent())
    assert torch.allclose(sums, together, atol=1e-5)
    for row, found in zip(rows, sums, strict=True):
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([row.ids]), output_hidden_states=True).hidden_states[-1][0]
        # From the last token of the prompt up to the one before the end token.
        reference = states[row.answer_start - 1 : -1].double().sum(0)
        assert row.ends
        assert torch.allclose(found, reference, atol=1e-5)


def test_equal_answers_score_zero_and_sides_matter(checkpoints: dict[str, Path]) -> None:
    root = checkpoints["tied_llama"]
    model = load_model(root, torch.float32, torch.device("cpu"))
    rows = [Encoded((5, 6, 7, 8), 2, True), Encoded((5, 6, 9, 10, 11), 2, True)]
    one, two = hidden_sums(model, rows, 0, 2, Silent())
    same = similarity(one, one, 2, 2)
    assert (same.ches, same.ln_ches) == (0, 0)
    assert similarity(one, two, 2, 3) != similarity(two, one, 3, 2)
