"""Priors of answer letters, from what a model says in every cyclic order of the options.

With s[i, o, j] the log-probability of letter j for item i in order o, in which slot j holds option (o + j) mod n:

    PriDe (arXiv 2309.03882)    per item softmax_j(mean_o log(p[o, j] + 1e-10)), p normalised over the letters;
                                contents cancel, since each stands at every letter once
    share-fit                   offsets delta for which every letter is the likeliest equally often over all orders

Taking away a prior is adding delta = -log prior to the letters' logits. Share-fit solves a convex problem,

    minimise over delta   mean_k max_j(s[k, j] + delta[j]) - sum_j t[j] delta[j]

whose slope in delta[j] is the share of letter j minus t[j], the share that is aimed at (1/n), with the maximum
smoothed to T logsumexp(. / T), T falling.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax, logsumexp, softmax

Numbers = npt.NDArray[np.float64]

EPSILON = 1e-10
"""What the released code of PriDe adds to probabilities before the logarithm."""

TEMPERATURES = (1.0, 0.5, 0.25, 0.12, 0.06)
STEPS = 60


def item_priors(scores: Numbers) -> Numbers:
    """Return PriDe's prior of each item [items, letters].

    Args:
        scores: log p of the letters [items, orders, letters], of whatever total.
    """
    probabilities = softmax(scores, -1)
    return np.asarray(softmax(np.log(probabilities + EPSILON).mean(1), -1))


def mean_prior(priors: Numbers, aggregation: str = "geometric") -> Numbers:
    """Return the prior of all items [letters].

    Args:
        priors: Prior of each item [items, letters].
        aggregation: "arithmetic", as released, or "geometric": it recovers a constant offset exactly, where the
            arithmetic mean falls short if items differ.
    """
    if aggregation == "arithmetic":
        return np.asarray(priors.mean(0) / priors.mean(0).sum())
    return np.asarray(softmax(np.log(priors).mean(0)))


def centred_offsets(prior: Numbers, target: Sequence[float] = ()) -> Numbers:
    """Return what takes a prior to a target (uniform by default), of mean 0, so that letters keep their mass."""
    goal = np.log(np.asarray(target)) if len(target) else np.zeros(len(prior))
    delta = goal - np.log(prior)
    return np.asarray(delta - delta.mean())


def shares(scores: Numbers, delta: Numbers) -> Numbers:
    """Return how often each letter is the likeliest [letters], given scores [..., letters] and offsets."""
    chosen = (scores + delta).argmax(-1).reshape(-1)
    return np.bincount(chosen, minlength=len(delta)) / len(chosen)


def share_offsets(scores: Numbers, target: Sequence[float] = ()) -> Numbers:
    """Return the offsets, of mean 0, that make every letter the likeliest as often as is aimed at.

    Args:
        scores: log p of the letters [items, orders, letters].
        target: Share of each letter; equal ones by default.
    """
    letters = scores.shape[-1]
    goal = np.asarray(target) / sum(target) if len(target) else np.full(letters, 1 / letters)
    flat = scores.reshape(-1, letters)
    delta = centred_offsets(mean_prior(item_priors(scores)), target)
    for temperature in TEMPERATURES:
        for _ in range(STEPS):
            weights = softmax((flat + delta) / temperature, -1)
            slope = weights.mean(0) - goal
            if np.abs(slope).max() < 1e-10:
                break
            curve = (np.diag(weights.sum(0)) - weights.T @ weights) / (len(flat) * temperature)
            # Adding a constant to all letters changes nothing: the pseudo-inverse leaves that direction alone.
            step = -np.linalg.pinv(curve, rcond=1e-9, hermitian=True) @ slope
            delta = _descend(flat, delta, step, temperature, goal)
    return np.asarray(delta - delta.mean())


def _objective(flat: Numbers, delta: Numbers, temperature: float, goal: Numbers) -> float:
    return float(temperature * logsumexp((flat + delta) / temperature, -1).mean() - delta @ goal)


def _descend(flat: Numbers, delta: Numbers, step: Numbers, temperature: float, goal: Numbers) -> Numbers:
    """Return the offsets after as much of a step as makes the objective smaller."""
    before = _objective(flat, delta, temperature, goal)
    # Far from the solution the curve is flat and a full step leads nowhere.
    size = min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
    for _ in range(30):
        after = delta + size * step
        if _objective(flat, after, temperature, goal) <= before:
            return after
        size /= 2
    return delta


def estimate_offsets(
    scores: Numbers, estimator: str, aggregation: str, target: Sequence[float] = ()
) -> tuple[Numbers, Numbers]:
    """Return the offsets of an estimator, and PriDe's prior.

    Args:
        scores: log p of the letters [items, orders, letters].
        estimator: "share" or "pride".
        aggregation: "geometric" or "arithmetic", for the prior.
        target: Share of each letter that is aimed at; equal ones by default.
    """
    prior = mean_prior(item_priors(scores), aggregation)
    return (share_offsets(scores, target) if estimator == "share" else centred_offsets(prior, target)), prior


def debiased(scores: Numbers, delta: Numbers) -> Numbers:
    """Return the probabilities of the letters with offsets, normalised over the letters."""
    return np.asarray(softmax(log_softmax(scores, -1) + delta, -1))


def content_scores(scores: Numbers) -> Numbers:
    """Return each option's mean probability over the orders [items, options]: the permutation average."""
    probabilities = softmax(scores, -1)
    items, orders, letters = probabilities.shape
    result = np.zeros((items, letters))
    for order in range(orders):
        for slot in range(letters):
            result[:, (order + slot) % letters] += probabilities[:, order, slot] / orders
    return result


def calibrate(probabilities: Numbers, content_free: Numbers, form: str = "diagonal") -> Numbers:
    """Return contextual calibration of class probabilities (arXiv 2102.09690).

    Args:
        probabilities: Of the classes [..., classes].
        content_free: Of the classes without content [inputs, classes]; they are averaged and normalised.
        form: "diagonal" for W = diag(p_cf)^-1, normalised; "identity" for p - p_cf.
    """
    prior = content_free.mean(0)
    prior = prior / prior.sum()
    if form == "identity":
        return np.asarray(probabilities - prior)
    scaled = probabilities / prior
    return np.asarray(scaled / scaled.sum(-1, keepdims=True))
