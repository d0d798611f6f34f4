"""Decode vectors of the residual stream through the language-model head: which tokens does a vector stand for?

Papers: "Decoding specialised feature neurons in LLMs with the final projection layer" and "Flash Interpretability",
arXiv 2501.02688; p = softmax(W w), W the head [vocabulary, width], w a neuron's vector.

The softmax of a short vector is nearly flat, so p does not compare vectors of different norms. Beside it stand the
margin, first less second logit, which says whether a vector names a token at all, and z, the distance of the first
logit from the mean in standard deviations over the vocabulary, which does not depend on the norm: rank by z. Biases and
caps of the head are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llmsurgery.arch.neurons import NeuronVectors
from llmsurgery.arch.spec import Structure
from llmsurgery.checkpoint import Checkpoint, decode, require_finite
from llmsurgery.compute.head import CHUNK_ELEMENTS
from llmsurgery.errors import InputError

VECTORS = 2048
"""Vectors decoded at once."""

SHORT = 1e-3
"""A row of the head that is shorter than this share of the median row was never trained."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The rows of the head that stand for text.

    Attributes:
        rows: Their values [used, width], in the stored dtype.
        ids: Their token ids [used], ascending.
        mean: Mean row [width], fp32, gain included.
        gain: What each coordinate is multiplied by before the head reads it [width], or None.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    mean: torch.Tensor
    gain: torch.Tensor | None

    @classmethod
    def of(cls, rows: torch.Tensor, ids: torch.Tensor, gain: torch.Tensor | None = None) -> Vocabulary:
        """Return a vocabulary of some rows of a head."""
        total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        step = max(1, CHUNK_ELEMENTS // rows.shape[1])
        for start in range(0, len(rows), step):
            total += rows[start : start + step].double().sum(0)
        mean = total / len(rows)
        return cls(rows, ids, (mean if gain is None else mean * gain.double()).float(), gain)

    def centred(self, start: int, stop: int) -> torch.Tensor:
        """Return some rows less the mean row, fp32: logits of them have mean 0 over the vocabulary."""
        rows = self.rows[start:stop].float()
        return (rows if self.gain is None else rows * self.gain) - self.mean


@dataclass(frozen=True, eq=False)
class Decoded:
    """What vectors say.

    Attributes:
        ids: Token ids of the largest logits [vectors, top], largest first, ties by id.
        p: Their softmax probabilities [vectors, top], fp32.
        scores: Their logits less the mean, in standard deviations over the vocabulary [vectors, top]; 0 for vectors
            that give all tokens the same logit.
        margin: First less second logit [vectors]. A vector of margin 0 names no token.
    """

    ids: torch.Tensor
    p: torch.Tensor
    scores: torch.Tensor
    margin: torch.Tensor

    @property
    def z(self) -> torch.Tensor:
        """Scores of the first tokens [vectors]."""
        return self.scores[:, 0]

    @classmethod
    def join(cls, parts: Sequence[Decoded]) -> Decoded:
        """Put the results of several calls one below the other."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "p", "scores", "margin")))


def decode_vectors(vectors: torch.Tensor, vocabulary: Vocabulary, top: int) -> Decoded:
    """Decode vectors, with no more than a block of their logits in memory.

    Args:
        vectors: Vectors [vectors, width], fp32.
        vocabulary: The head.
        top: Tokens to keep for each.

    Returns:
        Their strongest tokens, on the processor; at most as many as the vocabulary has.
    """
    size = len(vocabulary.ids)
    keep = min(max(top, 2), size)
    best = torch.empty(len(vectors), 0, device=vectors.device)
    places = torch.empty(len(vectors), 0, dtype=torch.int64, device=vectors.device)
    log_sum = torch.full((len(vectors),), -torch.inf, device=vectors.device)
    squares = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    step = max(keep, CHUNK_ELEMENTS // max(1, len(vectors)))
    for start in range(0, size, step):
        logits = vectors @ vocabulary.centred(start, min(start + step, size)).T
        values, found = logits.topk(min(keep, logits.shape[1]), dim=1)
        squares += torch.linalg.vecdot(logits, logits)
        log_sum = torch.logaddexp(log_sum, logits.logsumexp(1))
        # Ties go to the lower id: by id first, then by value without changing the order of equals.
        found, order = found.sort(dim=1)
        best = torch.cat([best, values.gather(1, order)], dim=1)
        places = torch.cat([places, found + start], dim=1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, places = best[:, :keep], places.gather(1, order)[:, :keep]
    deviation = (squares / size).sqrt().float()[:, None]
    scores = torch.where(deviation > 0, best / deviation, 0.0)
    margin = best[:, 0] - best[:, 1] if keep > 1 else best[:, 0]
    ids = vocabulary.ids[places[:, :top]]
    p = (best[:, :top] - log_sum[:, None]).exp()
    return Decoded(ids.cpu(), p.cpu(), scores[:, :top].cpu(), margin.cpu())


def read_tensor(checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Read rows of a stored tensor in its stored dtype, without mapping the file.

    Raises:
        DamagedError: It holds NaN or Inf.
    """
    code = checkpoint.info(name).dtype
    raw = checkpoint.read(name, start, stop)
    require_finite(raw, code, name, start)
    # numpy knows no bfloat16: the same bits under another name.
    return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16) if code == "BF16" else torch.from_numpy(raw)


def read_vocabulary(
    checkpoint: Checkpoint,
    structure: Structure,
    used: torch.Tensor,
    gain: torch.Tensor | None,
    device: torch.device,
) -> Vocabulary:
    """Read the head of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        structure: Its roles.
        used: Which token ids may be named [tokens]; see `trained_rows`.
        gain: Gain of the final norm [width], or None.
        device: Where to put it.

    Raises:
        InputError: No row is left.
    """
    ids = used.nonzero().squeeze(1)
    if len(ids) < 2:
        raise InputError(
            "no token of the vocabulary can be named",
            "none of them is text with a trained row in the head",
            "check that tokenizer and weights belong together",
        )
    rows = read_tensor(checkpoint, head_name(structure))[ids]
    return Vocabulary.of(rows.to(device), ids.to(device), None if gain is None else gain.to(device))


def head_name(structure: Structure) -> str:
    """Return the stored name of the head, that of the embedding where they are tied."""
    return structure.select(["lm_head"])[0].stored


def trained_rows(checkpoint: Checkpoint, structure: Structure) -> torch.Tensor:
    """Return which rows of the head were trained [tokens].

    Rows next to zero, and rows that are equal to another to the last bit, belong to reserved tokens. Left in, they
    would be the first choice of many vectors that mean nothing.
    """
    name = head_name(structure)
    norms: list[torch.Tensor] = []
    digests: list[int] = []
    for start, stop in checkpoint.row_blocks(name, 16 << 20):
        rows = read_tensor(checkpoint, name, start, stop)
        norms.append(rows.float().norm(dim=1))
        digests += [hash(row.tobytes()) for row in rows.view(torch.uint8).numpy()]
    lengths = torch.cat(norms)
    _, back, counts = np.unique(np.array(digests), return_inverse=True, return_counts=True)
    return (lengths >= SHORT * lengths.median()) & torch.from_numpy(counts[back.reshape(-1)] == 1)


def read_vectors(checkpoint: Checkpoint, place: NeuronVectors, size: int = VECTORS) -> Iterator[torch.Tensor]:
    """Read the vectors of some neurons, in blocks [size, width], fp32.

    Rows are read as they are needed. Columns lie all over the matrix, so it is read as a whole, in its stored dtype.
    """
    name = place.tensor.stored
    if place.as_rows:
        for start in range(place.first, place.first + place.count, size):
            stop = min(start + size, place.first + place.count)
            yield read_tensor(checkpoint, name, start, stop).float()
        return
    raw, code = checkpoint.read(name), checkpoint.info(name).dtype
    require_finite(raw, code, name)
    for start in range(0, place.count, size):
        block = np.ascontiguousarray(raw[:, place.first + start : place.first + min(start + size, place.count)].T)
        yield torch.from_numpy(decode(block, code)).float()


def norm_gain(checkpoint: Checkpoint, structure: Structure, role: str, layer: int | None = None) -> torch.Tensor | None:
    """Return what a norm multiplies each coordinate by [width], fp32; None if the family has no such norm there."""
    found = next(
        (tensor for tensor in structure.tensors if (tensor.role, tensor.layer, tensor.part) == (role, layer, "weight")),
        None,
    )
    if found is None:
        return None
    return read_tensor(checkpoint, found.stored).float() + structure.family.norm_offset
