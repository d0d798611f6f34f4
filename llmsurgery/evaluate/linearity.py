"""How linear a model's norms are, and what direct logit attribution is worth there.

Direct logit attribution reads a component c of the last residual x (the embedding, or what an attention or MLP added)
through the last norm as if its divisor were a constant:

    attribution(c) = ((c - mean c) / s(x) * g) . w          with w the row of the head of the token that follows

What it stands for is the effect of taking the component away, with the divisor of what is left:

    effect(c) = logit(x) - logit(x - c)
    error = sum |effect - attribution| / sum |effect|       over tokens and components

For a norm that divides by a constant both are the same. They are computed in fp64 from residuals in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.norms import norms_of
from llmsurgery.arch.spec import Structure
from llmsurgery.compute.fake_norms import affine_error, norm_eps
from llmsurgery.compute.head import read_head
from llmsurgery.compute.residual import final_norm, read_entries, read_sites
from llmsurgery.data.chat import Encoded
from llmsurgery.evaluate.figures import Measurement
from llmsurgery.evaluate.intervals import Figure
from llmsurgery.evaluate.pruning import cross_entropy

TEXTS, TOKENS = 8, 64
"""Passages, and tokens of each, that are looked at: every token has as many components as the model has sublayers."""


@dataclass(frozen=True)
class Attribution:
    """Effects and attributions of one model.

    Attributes:
        effects: Component -> sum of |effect| over tokens.
        errors: Component -> sum of |effect - attribution| over tokens.
        tokens: Number of tokens.
    """

    effects: Mapping[str, float]
    errors: Mapping[str, float]
    tokens: int

    @property
    def error(self) -> float:
        """Error over all components."""
        return sum(self.errors.values()) / max(sum(self.effects.values()), 1e-300)

    def by_component(self) -> dict[str, float]:
        """Return the error of each component."""
        return {name: self.errors[name] / max(effect, 1e-300) for name, effect in self.effects.items()}


def with_linearity_figures(
    measured: Measurement, model: PreTrainedModel, structure: Structure, texts: Sequence[Encoded]
) -> Measurement:
    """Add loss and linearity to the figures of a model.

    Args:
        measured: Its other figures.
        model: The loaded model.
        structure: Its roles.
        texts: Ordinary text.
    """
    figures: dict[str, Figure] = {}
    if (perplexity := measured.figures.get("utility.ppl")) is not None:
        figures["utility.ce"] = cross_entropy(perplexity)
    figures |= linearity_figures(model, structure, texts)
    return replace(measured, figures={**measured.figures, **figures})


def linearity_figures(
    model: PreTrainedModel, structure: Structure, texts: Sequence[Encoded]
) -> dict[str, Figure]:  # fmt: skip
    """Return both figures, with the values of single norms and components in their details."""
    errors = norm_errors(model, structure, texts)
    found = attribution(model, structure, texts)
    return {
        "linearity.norm_error": Figure(max(errors.values()), len(errors), None, {"norms": errors}),
        "linearity.attribution_error": Figure(found.error, found.tokens, None, {"components": found.by_component()}),
    }


@torch.inference_mode()
def norm_errors(model: PreTrainedModel, structure: Structure, texts: Sequence[Encoded]) -> dict[str, float]:
    """Return how far every norm is from an affine map, on what it reads of a text; see `affine_error`."""
    caught: dict[str, torch.Tensor] = {}
    handles = []
    modules = {norm.name: model.get_submodule(norm.weight.module) for norm in norms_of(structure)}
    for name, module in modules.items():

        def hook(
            _module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], _output: object, name: str = name
        ) -> None:
            caught[name] = arguments[0].flatten(0, -2)

        handles.append(module.register_forward_hook(hook))
    try:
        ids = torch.tensor([texts[0].ids[:TOKENS]], device=model.device)
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: affine_error(modules[name], states) for name, states in caught.items()}


@torch.inference_mode()
def attribution(model: PreTrainedModel, structure: Structure, texts: Sequence[Encoded]) -> Attribution:
    """Compare direct logit attribution with the effect of every component on the logit of the token that follows."""
    effects: dict[str, float] = {}
    errors: dict[str, float] = {}
    reader = _LastNorm(model, structure)
    count = 0
    for text in texts[:TEXTS]:
        ids = torch.tensor([text.ids[:TOKENS]], device=model.device)
        if ids.shape[1] < 2:
            continue
        rows = reader.head[ids[0, 1:]]
        count += len(rows)
        parts = components(model, structure, ids)
        last = parts.pop("last")[0, :-1].double()
        whole = reader.logit(last, rows)
        for name, states in parts.items():
            part = states[0, :-1].double()
            effect = whole - reader.logit(last - part, rows)
            direct = reader.attribute(part, last, rows)
            effects[name] = effects.get(name, 0.0) + float(effect.abs().sum())
            errors[name] = errors.get(name, 0.0) + float((effect - direct).abs().sum())
    return Attribution(effects, errors, count)


def components(model: PreTrainedModel, structure: Structure, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what the last residual is the sum of, by name, and that residual as "last"; all [batch, time, width].

    Args:
        model: The loaded model.
        structure: Its roles.
        ids: Token ids [batch, time].
    """
    mask = torch.ones_like(ids)
    entries = read_entries(model, structure, ids, mask)
    found = {"embedding": entries[0], "last": entries[-1]}
    for site in ("attention", "mlp"):
        added = read_sites(model, structure, site, ids, mask)
        assert added is not None
        found |= {f"{site} {layer}": states for layer, states in enumerate(added)}
    return found


class _LastNorm:
    """The last norm and the head in fp64."""

    def __init__(self, model: PreTrainedModel, structure: Structure) -> None:
        module = final_norm(model, structure)
        self.eps, self.centres = norm_eps(module), structure.family.norm_centres
        self.gain = module.get_parameter("weight").double() + structure.family.norm_offset
        bias = getattr(module, "bias", None)
        self.bias = torch.zeros_like(self.gain) if bias is None else bias.double()
        self.head = read_head(model).weight.double()

    def _centred(self, states: torch.Tensor) -> torch.Tensor:
        return states - states.mean(-1, keepdim=True) if self.centres else states

    def _divisor(self, states: torch.Tensor) -> torch.Tensor:
        return (self._centred(states).square().mean(-1, keepdim=True) + self.eps).sqrt()

    def logit(self, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the logit [tokens] that each row of the head has for its state [tokens, width]."""
        normed = self._centred(states) / self._divisor(states) * self.gain + self.bias
        return (normed * rows).sum(-1)

    def attribute(self, part: torch.Tensor, last: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the attribution [tokens] of a part of the last residual, with the divisor of the whole."""
        return (self._centred(part) / self._divisor(last) * self.gain * rows).sum(-1)
