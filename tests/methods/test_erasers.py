"""Projections: worked numbers, and that no linear classifier finds what was erased."""

from __future__ import annotations

import numpy as np
import pytest

from llmsurgery.methods.erasers import inlp, leace, nullspace, one_hot, probe_accuracy, sal, signed_columns


def test_worked_numbers() -> None:
    rows = np.array([[1.0, 0, 0, 0], [1, 1, 0, 0]])
    assert nullspace(rows, np.zeros(4)).matrix() == pytest.approx(np.diag([0.0, 0, 1, 1]), abs=1e-12)
    states = np.array([[1.0, 0, 1], [2, 1, 0], [-1, 0, 1], [-2, 1, 0]])
    eraser = sal(states, np.array([1.0, 1, -1, -1]))
    assert eraser.matrix() == pytest.approx(np.diag([0.0, 1, 1]), abs=1e-12)


def sample(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    labels, _ = one_hot(["a" if i % 2 else "b" for i in range(count)])
    mixed = draw.normal(size=(count, 6)) @ np.diag([3.0, 1, 1, 0.5, 2, 1]) + 5
    return mixed + np.outer(labels[:, 0], [1.5, 0.5, 0, -1, 0, 0]) @ np.eye(6), labels


def test_erased_states_hold_nothing_for_a_linear_classifier() -> None:
    train, test = sample(400, 0), sample(400, 1)
    assert probe_accuracy(train, test) > 0.75
    erasers = {"leace": leace(*train), "sal": sal(*train), "inlp": inlp(*train, rounds=6)}
    for name, eraser in erasers.items():
        found = probe_accuracy((eraser.apply(train[0]), train[1]), (eraser.apply(test[0]), test[1]))
        assert found < 0.65, name
        projector = eraser.matrix()
        assert projector @ projector == pytest.approx(projector, abs=1e-9)
    # No cross-covariance is left, whatever the shrinkage, and the mean stays.
    for shrinkage in (0.0, 0.1, 0.9):
        eraser = leace(*train, shrinkage)
        left = eraser.apply(train[0])
        assert (left - left.mean(0)).T @ (train[1] - train[1].mean(0)) == pytest.approx(np.zeros((6, 2)), abs=1e-8)
        assert left.mean(0) == pytest.approx(train[0].mean(0))
    # LEACE moves states less than any other projection that guards, measured as it measures.
    moved = {name: np.square(eraser.apply(train[0]) - train[0]).sum() for name, eraser in erasers.items()}
    assert np.square(leace(*train, 0.0).apply(train[0]) - train[0]).sum() < moved["sal"]


def test_signs_of_pairs_leave_the_groups_alone() -> None:
    columns = signed_columns(["race+", "race-", "age+", "age-"], [0, 0, 0, 0], 1)
    assert columns.tolist() == [[0, 1], [0, -1], [1, 0], [-1, 0]]
    # Tokens behind the difference have columns of their own, the last of them for all that follow.
    columns = signed_columns(["+", "+", "+", "-"], [0, 1, 5, 9], 2)
    assert columns.tolist() == [[1, 0], [0, 1], [0, 1], [0, -1]]
