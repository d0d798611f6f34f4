"""Projections that take an attribute out of states, from states x [n, d] with labels z.

    SAL     Omega = E[(x - mean x)(z - mean z)^T], U its left singular vectors, P = I - U U^T    (arXiv 2203.07893)
    LEACE   W = Sigma^{-1/2}, U an orthonormal basis of W Omega, P = I - W^+ U U^T W             (arXiv 2306.03819)
    INLP    repeated: a linear classifier of the attribute on what is left; P is the projection onto what is orthogonal
            to all of them (arXiv 2004.07667)

All are x -> x - (x - mean x)(I - P)^T for the affine form, x -> P x for the linear one. P = I - left right with
left [d, k] and right [k, d]. LEACE changes x least of all maps after which no linear classifier beats a constant one on
the sample; the covariance is shrunk towards a multiple of I, which keeps that property for any shrinkage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

Numbers = npt.NDArray[np.float64]

RANK_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Eraser:
    """A projection I - left right, and the mean about which its affine form acts.

    Attributes:
        left: [d, k].
        right: [k, d].
        mean: Mean of the states [d].
    """

    left: Numbers
    right: Numbers
    mean: Numbers

    @property
    def rank(self) -> int:
        """Number of directions that are taken out."""
        return int(self.left.shape[1])

    def matrix(self) -> Numbers:
        """Return P [d, d]."""
        return np.asarray(np.eye(len(self.left)) - self.left @ self.right)

    def apply(self, states: Numbers, affine: bool = True) -> Numbers:
        """Return states [n, d] without the attribute."""
        centre = self.mean if affine else 0.0
        return np.asarray(states - ((states - centre) @ self.right.T) @ self.left.T)


def one_hot(labels: Sequence[str]) -> tuple[Numbers, list[str]]:
    """Return labels as columns [n, classes] and the classes in order."""
    classes = sorted(set(labels))
    places = np.array([classes.index(label) for label in labels])
    return np.eye(len(classes))[places], classes


def signed_columns(labels: Sequence[str], offsets: Sequence[int], positions: int) -> Numbers:
    """Return labels of pairs, a group with "+" or "-", as columns of signs [n, groups * positions].

    A group has a column for each of the first tokens from the difference of a pair on, and its last one for all others:
    what a token is about lies elsewhere in the states of the tokens behind it. The groups themselves, which texts about
    them tell apart as well, are not erased.

    Args:
        labels: [n].
        offsets: Tokens behind the first difference [n].
        positions: Columns of a group.
    """
    groups = sorted({label[:-1] for label in labels})
    columns = np.zeros((len(labels), len(groups) * positions))
    for row, (label, offset) in enumerate(zip(labels, offsets, strict=True)):
        place = groups.index(label[:-1]) * positions + min(offset, positions - 1)
        columns[row, place] = 1.0 if label[-1] == "+" else -1.0
    return columns


def _cross(states: Numbers, labels: Numbers) -> Numbers:
    """Return Omega [d, columns]."""
    return np.asarray((states - states.mean(0)).T @ (labels - labels.mean(0)) / len(states))


def _basis(values: Numbers) -> Numbers:
    """Return an orthonormal basis of the columns, without directions that hold nothing."""
    left, sizes, _ = np.linalg.svd(values, full_matrices=False)
    return np.asarray(left[:, sizes > RANK_TOLERANCE * max(float(sizes.max(initial=0.0)), 1e-300)])


def sal(states: Numbers, labels: Numbers, rank: int = 0) -> Eraser:
    """Return SAL's projection.

    Args:
        states: [n, d].
        labels: [n] or [n, columns].
        rank: Directions taken out at most; 0: all that covary.
    """
    columns = labels.reshape(len(labels), -1)
    basis = _basis(_cross(states, columns))
    basis = basis[:, : rank or None]
    return Eraser(basis, basis.T, states.mean(0))


def leace(states: Numbers, labels: Numbers, shrinkage: float = 0.1) -> Eraser:
    """Return LEACE's projection; arguments as for `sal`.

    Args:
        states: [n, d].
        labels: [n] or [n, columns].
        shrinkage: Share of the mean variance times I in the covariance.
    """
    columns = labels.reshape(len(labels), -1)
    centred = states - states.mean(0)
    covariance = centred.T @ centred / len(states)
    width = len(covariance)
    covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / width * np.eye(width)
    values, vectors = np.linalg.eigh(covariance)
    kept = values > RANK_TOLERANCE * values.max()
    roots = np.sqrt(values[kept])
    whiten = (vectors[:, kept] / roots) @ vectors[:, kept].T
    unwhiten = (vectors[:, kept] * roots) @ vectors[:, kept].T
    basis = _basis(whiten @ _cross(states, columns))
    return Eraser(unwhiten @ basis, basis.T @ whiten, states.mean(0))


def nullspace(rows: Numbers, mean: Numbers) -> Eraser:
    """Return the projection onto what is orthogonal to some rows [k, d]."""
    basis = _basis(rows.T)
    return Eraser(basis, basis.T, mean)


def inlp(states: Numbers, labels: Numbers, rounds: int) -> Eraser:
    """Return INLP's projection after some rounds; labels [n, classes] of one-hot rows."""
    left = states
    rows: list[Numbers] = []
    for _ in range(rounds):
        found = linear_classifier(left, labels)
        rows += [row for row in found if np.linalg.norm(row) > 1e-8]
        if not rows:
            break
        left = nullspace(np.stack(rows), states.mean(0)).apply(states, affine=False)
    return nullspace(np.stack(rows) if rows else np.zeros((1, states.shape[1])), states.mean(0))


def linear_classifier(states: Numbers, labels: Numbers) -> Numbers:
    """Return a linear support vector machine without intercept, one row per class (one row for two) [rows, d].

    Squared hinge loss with C = 1, on states of mean length 1, so that the penalty means the same in every model.
    """
    scale = float(np.linalg.norm(states, axis=1).mean()) or 1.0
    inputs = states / scale
    columns = labels[:, :1] if labels.shape[1] == 2 else labels
    rows = []
    for column in columns.T:
        signs = np.where(column > 0.5, 1.0, -1.0)

        def loss(row: Numbers, signs: Numbers = signs) -> tuple[float, Numbers]:
            margins = np.maximum(0.0, 1 - signs * (inputs @ row))
            slope = row - 2 * (signs * margins) @ inputs
            return 0.5 * float(row @ row) + float((margins**2).sum()), slope

        rows.append(minimize(loss, np.zeros(states.shape[1]), jac=True, method="L-BFGS-B").x)
    return np.stack(rows)


def probe_accuracy(train: tuple[Numbers, Numbers], test: tuple[Numbers, Numbers]) -> float:
    """Return how often a linear classifier of the attribute is right on states it was not fitted to.

    Args:
        train: States [n, d] and one-hot labels [n, classes].
        test: The same, of other texts.
    """
    mean = train[0].mean(0)
    rows = linear_classifier(train[0] - mean, train[1])
    scores = (test[0] - mean) @ rows.T
    found = np.where(scores[:, 0] > 0, 0, 1) if train[1].shape[1] == 2 else scores.argmax(1)
    return float((found == test[1].argmax(1)).mean())
