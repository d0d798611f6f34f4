"""Priors of letters: the worked numbers of the specification, and what each estimator recovers."""

from __future__ import annotations

import numpy as np
import pytest

from llmsurgery.methods.label_offsets import constant_reader
from llmsurgery.methods.priors import (
    calibrate,
    centred_offsets,
    content_scores,
    debiased,
    estimate_offsets,
    item_priors,
    mean_prior,
    share_offsets,
    shares,
)

ORDERS = np.log(
    [[[0.50, 0.30, 0.10, 0.10], [0.60, 0.15, 0.15, 0.10], [0.55, 0.15, 0.10, 0.20], [0.45, 0.15, 0.30, 0.10]]]
)


def test_pride_of_one_question() -> None:
    prior = item_priors(ORDERS)[0]
    assert prior == pytest.approx([0.540963, 0.184860, 0.150937, 0.123240], abs=1e-6)
    delta = centred_offsets(prior)
    assert delta == pytest.approx([-0.957365, 0.116389, 0.319122, 0.521854], abs=1e-6)
    row = debiased(ORDERS[0, 0], delta)
    assert row == pytest.approx([0.229858, 0.403586, 0.164763, 0.201793], abs=1e-6)
    assert (ORDERS[0, 0].argmax(), row.argmax()) == (0, 1)
    assert content_scores(ORDERS)[0] == pytest.approx([0.2125, 0.35, 0.225, 0.2125])


def test_contextual_calibration() -> None:
    row = np.array([0.55, 0.25, 0.15, 0.05])
    free = np.array([[0.6, 0.2, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]])
    assert calibrate(row, free) == pytest.approx([0.22, 0.30, 0.36, 0.12], abs=5e-3)
    assert calibrate(row, free, "identity") == pytest.approx([-0.05, 0.05, 0.05, -0.05])
    # The constant offset is the same thing.
    delta = centred_offsets(free.mean(0))
    assert debiased(np.log(row), delta) == pytest.approx(calibrate(row, free))


def planted(items: int, letters: int, offset: float, seed: int = 0) -> np.ndarray:
    """Scores of items whose contents stand at every letter once, with noise and an offset on the first letter."""
    draw = np.random.default_rng(seed)
    contents, noise = draw.normal(0, 1.5, (items, letters)), draw.normal(0, 1, (items, letters, letters))
    scores = np.stack([np.roll(contents, -order, 1) for order in range(letters)], 1) + noise
    scores[..., 0] += offset
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def test_geometric_mean_recovers_what_the_arithmetic_one_does_not() -> None:
    scores, clean = planted(200, 4, 3.0), planted(200, 4, 0.0)

    def lead(scores: np.ndarray, aggregation: str) -> float:
        log_prior = np.log(mean_prior(item_priors(scores), aggregation))
        return float(log_prior[0] - log_prior[1:].mean())

    assert lead(scores, "geometric") - lead(clean, "geometric") == pytest.approx(3.0, abs=1e-3)
    assert lead(scores, "arithmetic") - lead(clean, "arithmetic") < 2.95
    delta, prior = estimate_offsets(scores, "pride", "geometric")
    assert prior[0] > 0.7
    assert mean_prior(item_priors(scores + delta)) == pytest.approx([0.25] * 4, abs=1e-6)


@pytest.mark.parametrize("letters", [2, 3, 5])
def test_share_fit_makes_every_letter_as_frequent(letters: int) -> None:
    scores = planted(120, letters, 4.0, 1)
    assert shares(scores, np.zeros(letters))[0] > 0.8
    delta = share_offsets(scores)
    assert abs(delta.sum()) < 1e-9
    assert np.abs(shares(scores, delta) - 1 / letters).max() < 0.02
    # It is the same for another start: the offset itself changes nothing.
    moved = share_offsets(scores + np.arange(letters) * 3.0)
    assert moved + np.arange(letters) * 3.0 - (np.arange(letters) * 3.0).mean() == pytest.approx(delta, abs=1e-3)


def test_least_squares_route() -> None:
    states = np.array([[1.0, 1.0], [1.0, -1.0], [2.0, 0.0]])
    reader, rho = constant_reader(states, ridge=0.0)
    assert reader == pytest.approx([0.75, 0.0])
    assert rho == pytest.approx(0.888889, abs=1e-6)
    outputs = states @ reader
    assert outputs == pytest.approx([0.75, 0.75, 1.5])
    assert (outputs.mean(), outputs.std()) == (pytest.approx(1.0), pytest.approx(np.sqrt((1 - rho) / rho)))


def test_layernorm_route() -> None:
    gain, bias, delta = np.array([1, 2, 0.5, 1]), np.array([0.1, 0.2, 0.3, 0.4]), 2.0
    total = (bias / gain).sum()
    row = delta / total / gain
    assert total == pytest.approx(1.2)
    assert row == pytest.approx([1.666667, 0.833333, 3.333333, 1.666667], abs=1e-6)
    for normed in ([1, -1, 1, -1], [0.5, 1.5, -2, 0]):
        assert row @ (gain * np.array(normed) + bias) == pytest.approx(2.0)


def test_a_target_is_reached_in_place_of_equal_shares() -> None:
    scores, target = planted(200, 4, 3.0), (0.4, 0.3, 0.2, 0.1)
    delta, prior = estimate_offsets(scores, "pride", "geometric", target)
    assert delta == pytest.approx(np.log(target) - np.log(prior) - (np.log(target) - np.log(prior)).mean())
    assert mean_prior(item_priors(scores + delta)) == pytest.approx(target, abs=1e-6)
    delta, _ = estimate_offsets(scores, "share", "geometric", target)
    assert abs(delta.sum()) < 1e-9
    assert shares(scores, delta) == pytest.approx(target, abs=0.02)
    assert share_offsets(scores, (0.25,) * 4) == pytest.approx(share_offsets(scores))
