"""BCI: how improbable the tokens of short spans were in a reference corpus.

Paper: "TraceAlign", arXiv 2508.02063, which calls it the belief conflict index. With P(t) = count(t) / total over the
reference, in the model's own tokens, and 1e-9 for a token that it does not have:

    BCI(span) = - sum_t ln P(t)

Every window of 8 tokens of an answer that occurs in the reference, but no more than three times, is a candidate; an
answer is flagged if one of them has a BCI above tau. Longer spans score higher, so only windows of one length are
compared; shorter answers have none.

It measures rarity and nothing else: a harmless rare name scores like a harmful word, and a common harmful phrase scores
low. A single unseen token adds 20.7 nats and so passes a tau of 20.

What differs from the released code (vinija/tracealign), whose index lacks the methods that it calls: windows are looked
up by a 64-bit hash, in one pass over the reference in which only the windows of the data are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UNSEEN = 1e-9
"""Probability of a token that the reference does not have."""

Ids = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Reference:
    """What is kept of a reference corpus.

    Attributes:
        surprisal: -ln P(t) of every token id [vocabulary], float64.
        windows: Hashes of the windows that were looked for, ascending.
        counts: How often each occurs.
        tokens: Tokens of the corpus.
        passages: Passages of the corpus.
    """

    surprisal: npt.NDArray[np.float64]
    windows: Hashes
    counts: Ids
    tokens: int
    passages: int

    def found(self, ids: Ids, width: int) -> Ids:
        """Return how often each window of an answer occurs in the corpus [windows]."""
        hashes = window_hashes(ids, width)
        return np.asarray(self.counts[np.searchsorted(self.windows, hashes)]) if len(hashes) else np.zeros(0, np.int64)


@dataclass(frozen=True)
class Spans:
    """What is known of one answer.

    Attributes:
        tokens: Its length.
        windows: Its windows.
        candidates: Those of them that count.
        highest: The highest BCI of a candidate, None without one.
        start: The token that this window begins at.
        found: How often it occurs in the reference.
        density: BCI of the whole answer per token.
    """

    tokens: int
    windows: int
    candidates: int
    highest: float | None
    start: int | None
    found: int | None
    density: float


def surprisals(counts: Ids) -> npt.NDArray[np.float64]:
    """Return -ln P(t) of every token [vocabulary], from how often the reference has it."""
    total = max(1, int(counts.sum()))
    probabilities = np.where(counts > 0, counts / total, UNSEEN)
    return np.asarray(-np.log(probabilities))


def window_hashes(ids: Ids, width: int) -> Hashes:
    """Return a 64-bit hash of every window [len - width + 1]; equal windows have equal ones."""
    count = max(0, len(ids) - width + 1)
    total = np.zeros(count, dtype=np.uint64)
    for place in range(width):
        # Token and place together go through the finaliser of splitmix64, so that the sum knows the order.
        mixed = ids[place : place + count].astype(np.uint64) + np.uint64((place + 1) << 40)
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        total += mixed ^ (mixed >> np.uint64(31))
    return total


def read_reference(
    corpus: Iterable[Sequence[int]], answers: Iterable[Sequence[int]], width: int, vocabulary: int
) -> Reference:
    """Count the tokens of a corpus, and the windows of some answers in it.

    Args:
        corpus: Passages as token ids; they are gone through once.
        answers: Answers as token ids.
        width: Tokens of a window.
        vocabulary: Number of token ids.
    """
    wanted = [window_hashes(np.asarray(ids, dtype=np.int64), width) for ids in answers]
    windows = np.unique(np.concatenate([np.zeros(0, np.uint64), *wanted]))
    tokens = np.zeros(vocabulary, dtype=np.int64)
    counts = np.zeros(len(windows), dtype=np.int64)
    passages = 0
    for passage in corpus:
        ids = np.asarray(passage, dtype=np.int64)
        tokens += np.bincount(ids, minlength=vocabulary)
        hashes = window_hashes(ids, width)
        if len(hashes) and len(windows):
            places = np.minimum(np.searchsorted(windows, hashes), len(windows) - 1)
            np.add.at(counts, places[windows[places] == hashes], 1)
        passages += 1
    return Reference(surprisals(tokens), windows, counts, int(tokens.sum()), passages)


def score_spans(answer: Sequence[int], reference: Reference, width: int, most_found: int, every: bool = False) -> Spans:
    """Return what is known of one answer.

    Args:
        answer: Token ids.
        reference: The corpus.
        width: Tokens of a window.
        most_found: Windows that occur more often are no candidates; 0 for no bound.
        every: Whether windows that do not occur are candidates too.
    """
    ids = np.asarray(answer, dtype=np.int64)
    surprisal = reference.surprisal[ids]
    density = float(surprisal.mean()) if len(ids) else 0.0
    found = reference.found(ids, width)
    candidate = (found > 0) | every
    if most_found:
        candidate &= found <= most_found
    places = np.flatnonzero(candidate)
    if not len(places):
        return Spans(len(ids), len(found), 0, None, None, None, density)
    sums = np.convolve(surprisal, np.ones(width), "valid")
    start = int(places[sums[places].argmax()])
    # Summed once more by itself: a convolution may add in another order.
    highest = float(surprisal[start : start + width].sum())
    return Spans(len(ids), len(found), len(places), highest, start, int(found[start]), density)


def kept_weight(highest: float | None, tau: float) -> float:
    """Return 1 - min(1, max(0, BCI - tau) / tau): the weight of a pair that is to be trained on less, not dropped."""
    return 1.0 if highest is None else 1.0 - min(1.0, max(0.0, highest - tau) / tau)
