"""Hold neurons of MLPs at a constant, find those of a word, and measure how strong they get."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.neurons import NeuronVectors
from llmsurgery.compute.decode import Vocabulary
from llmsurgery.compute.head import CHUNK_ELEMENTS

WHERES = ("post", "up")


@dataclass(frozen=True)
class Clamp:
    """One neuron and what it is held at.

    Attributes:
        reads: Where its row of `up` lies.
        writes: Where its column of `down` lies.
        neuron: Its number.
        where: "post": its activation, what `down` reads; "up": the product of `up` alone, still gated.
        value: The constant.
    """

    reads: NeuronVectors
    writes: NeuronVectors
    neuron: int
    where: str
    value: float = 0.0

    def at(self, value: float) -> Clamp:
        """Return the same neuron with another constant."""
        return replace(self, value=value)

    @property
    def hooked(self) -> tuple[str, int]:
        """Module path and column of what is held: an input of `down`, or an output of `up`."""
        place = self.writes if self.where == "post" else self.reads
        return place.tensor.module, place.first + self.neuron


@contextmanager
def clamped(model: PreTrainedModel, clamps: Sequence[Clamp]) -> Iterator[None]:
    """Hold neurons of dense MLPs at their constants, at every position, for the length of a `with` block."""
    with ExitStack() as stack:
        for clamp in clamps:
            path, column = clamp.hooked
            module = model.get_submodule(path)
            hook = _hold(column, clamp.value)
            handle = (
                module.register_forward_pre_hook(lambda _module, inputs, hook=hook: (hook(inputs[0]), *inputs[1:]))
                if clamp.where == "post"
                else module.register_forward_hook(lambda _module, _inputs, output, hook=hook: hook(output))
            )
            stack.callback(handle.remove)
        yield


def _hold(column: int, value: float) -> Any:
    def hook(values: torch.Tensor) -> torch.Tensor:
        changed = values.clone()
        changed[..., column] = value
        return changed

    return hook


def neuron_percentiles(
    model: PreTrainedModel, clamps: Sequence[Clamp], texts: Sequence[Sequence[int]], share: float
) -> list[float]:
    """Return a quantile of the absolute value of what each clamp holds, over all tokens of some texts.

    Args:
        model: A causal language model in eval mode.
        clamps: The neurons.
        texts: Token ids of each text.
        share: Quantile in [0, 1].
    """
    seen: list[list[torch.Tensor]] = [[] for _ in clamps]
    with ExitStack() as stack, torch.inference_mode():
        for clamp, values in zip(clamps, seen, strict=True):
            path, column = clamp.hooked

            def keep(found: torch.Tensor, column: int = column, values: list[torch.Tensor] = values) -> None:
                values.append(found[..., column].reshape(-1).float().abs().cpu())

            module = model.get_submodule(path)
            handle = (
                module.register_forward_pre_hook(lambda _module, inputs, keep=keep: keep(inputs[0]))
                if clamp.where == "post"
                else module.register_forward_hook(lambda _module, _inputs, output, keep=keep: keep(output))
            )
            stack.callback(handle.remove)
        for ids in texts:
            model(input_ids=torch.tensor([list(ids)], device=model.device))
    return [float(torch.cat(values).quantile(share)) for values in seen]


class WordScorer:
    """Scores vectors by a word, without the logits of all other tokens.

    The deviation over the vocabulary comes from the covariance of the head's rows: std^2 = w^T Cov w.

    Args:
        vocabulary: The head.
        ids: Tokens of the word.
    """

    def __init__(self, vocabulary: Vocabulary, ids: Sequence[int]) -> None:
        rows, size = vocabulary.rows, len(vocabulary.ids)
        self._covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        step = max(1, CHUNK_ELEMENTS // rows.shape[1])
        for start in range(0, size, step):
            block = vocabulary.centred(start, min(start + step, size))
            self._covariance += (block.T @ block).double() / size
        asked = torch.tensor(list(ids), device=vocabulary.ids.device)
        wanted = torch.isin(vocabulary.ids, asked).nonzero().squeeze(1).tolist()
        self._rows = torch.cat([vocabulary.centred(place, place + 1) for place in wanted]).double()

    def scores(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the largest z of the word's tokens for vectors [vectors, width]; 0 for a vector of zeros."""
        vectors = vectors.to(self._rows)
        deviation = (vectors @ self._covariance * vectors).sum(1).clamp(min=0).sqrt()
        best = (vectors @ self._rows.T).amax(1)
        return torch.where(deviation > 0, best / deviation.clamp(min=1e-300), 0.0)
