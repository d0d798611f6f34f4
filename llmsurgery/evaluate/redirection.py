"""How far a redirection went, without any data: distributions after prompts with the old name against the new one's.

With p_0 the source model, p the model measured, x a prompt with the old name and y the same prompt with the new one:

    redirect.kl             mean of KL(p_0(. | y) || p(. | x)) over the prompts that the edit was made from
    redirect.kl_paraphrase  the same over other wordings: shipped ones, and the pair's own `prompts`
    redirect.kl_alias       the same over the pair's aliases in place of the old name

and, at the last token of the name, with h the residual stream after the last edited block, mean over those prompts:

    redirect.residual       |h_x - h_y| / |h_x of the source - h_y|, h_y of the source: 1 before, 0 if all was written
    redirect.strength       the share of the way from h_x to h_y that was gone: 0 before, 1 if all was written

Rows of the last two are pairs, of the others prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import Structure
from llmsurgery.compute.divergence import divergence
from llmsurgery.compute.head import Head, read_head
from llmsurgery.compute.spots import Spot, read_spots
from llmsurgery.compute.stream import StreamedModel, in_memory
from llmsurgery.data.chat import Encoder
from llmsurgery.data.contexts import HELD_OUT, TEMPLATES, Context, make_context
from llmsurgery.data.pairs import Pair
from llmsurgery.evaluate.flips import Expected
from llmsurgery.evaluate.intervals import Figure, mean_figure

METRIC_OF = {"template": "redirect.kl", "paraphrase": "redirect.kl_paraphrase", "alias": "redirect.kl_alias"}


@dataclass(frozen=True)
class Probe:
    """A prompt with the old name and with the new one.

    Attributes:
        pair: Number of the pair.
        kind: "template", "paraphrase" or "alias".
        source: The prompt with the old name, or an alias.
        target: The prompt with the new name.
    """

    pair: int
    kind: str
    source: Context
    target: Context


@dataclass(frozen=True, eq=False)
class RedirectReference:
    """What the source model does with the probes; later models are compared with it.

    Attributes:
        head: The source's head; None if later blocks were not run.
        ends: Its final hidden states after the prompts with the new name [probes, width]; None likewise.
        source: Block -> residual stream at the end of the old name, mean over the templates [pairs, width].
        target: The same of the new name.
        block: The last edited block; None before that is known.
        expected: What it answers to forget rows with the new name in place of the old, by number of the row.
    """

    head: Head | None
    ends: torch.Tensor | None
    source: dict[int, torch.Tensor]
    target: dict[int, torch.Tensor]
    block: int | None = None
    expected: Mapping[int, Expected] = field(default_factory=dict)

    def at(self, block: int) -> RedirectReference:
        """Return the reference with the last edited block settled."""
        return dataclasses.replace(self, block=block)


def make_probes(encoder: Encoder, pairs: Sequence[Pair]) -> list[Probe]:
    """Return the probes of pairs of names; facts and names without a target have none.

    Raises:
        InputError: A name has no token, or a prompt is too long.
    """
    return list(_probes(encoder, pairs))


def _probes(encoder: Encoder, pairs: Sequence[Pair]) -> Iterator[Probe]:
    for number, pair in enumerate(pairs):
        if pair.prompt or not pair.target:
            continue
        wordings = [("template", text, pair.source) for text in TEMPLATES]
        wordings += [("paraphrase", text, pair.source) for text in (*HELD_OUT, *pair.prompts)]
        wordings += [("alias", text, alias) for alias in pair.aliases for text in TEMPLATES]
        for kind, text, name in wordings:
            yield Probe(number, kind, make_context(encoder, text, name), make_context(encoder, text, pair.target))


def spot_of(context: Context) -> Spot:
    """Return a context as token ids and the place of the name's last token."""
    return Spot(context.encoded.ids, context.last)


def reference_of(
    model: PreTrainedModel | StreamedModel,
    structure: Structure,
    probes: Sequence[Probe],
    pad_id: int,
    blocks: Sequence[int],
    whole: bool = True,
) -> RedirectReference:
    """Return what the source does with the probes.

    Args:
        model: The source model, loaded or streamed.
        structure: Its roles.
        probes: The probes.
        pad_id: Token id for padding.
        blocks: Blocks that may be edited.
        whole: Run the model to its end; else distributions cannot be compared later.
    """
    # Both names in one pass, each as a batch of its own: a streamed model may have seen it before.
    chosen = [probe for probe in probes if probe.kind == "template"]
    spots = [spot_of(context) for context in (*(p.source for p in chosen), *(p.target for p in chosen))]
    both = read_spots(model, structure, spots, pad_id, (), blocks, breaks=(len(chosen),)).states
    source = {block: _means(states[: len(chosen)], chosen) for block, states in both.items()}
    target = {block: _means(states[len(chosen) :], chosen) for block, states in both.items()}
    if not whole:
        return RedirectReference(None, None, source, target)
    ends = read_spots(model, structure, [spot_of(probe.target) for probe in probes], pad_id, ends=True).ends
    return RedirectReference(read_head(in_memory(model)).clone(), ends, source, target)


def _states(
    model: PreTrainedModel | StreamedModel,
    structure: Structure,
    probes: Sequence[Probe],
    pad_id: int,
    blocks: Sequence[int],
) -> dict[int, torch.Tensor]:
    """Return the residual stream at the end of the old name, per block and pair, mean over the templates."""
    chosen = [probe for probe in probes if probe.kind == "template"]
    seen = read_spots(model, structure, [spot_of(probe.source) for probe in chosen], pad_id, (), blocks)
    return {block: _means(states, chosen) for block, states in seen.states.items()}


def _means(states: torch.Tensor, probes: Sequence[Probe]) -> torch.Tensor:
    numbers = sorted({probe.pair for probe in probes})
    rows = [[i for i, probe in enumerate(probes) if probe.pair == n and probe.kind == "template"] for n in numbers]
    return torch.stack([states[row].double().mean(0) for row in rows])


def redirect_figures(
    model: PreTrainedModel | StreamedModel,
    structure: Structure,
    probes: Sequence[Probe],
    pad_id: int,
    reference: RedirectReference,
) -> dict[str, Figure]:
    """Measure a model against what the source does with the probes.

    Args:
        model: The model, loaded or streamed.
        structure: Its roles.
        probes: The probes that the reference was made with.
        pad_id: Token id for padding.
        reference: What the source does.
    """
    figures = {} if reference.ends is None else _distances(model, structure, probes, pad_id, reference)
    return figures | _written(model, structure, probes, pad_id, reference)


def _distances(
    model: PreTrainedModel | StreamedModel,
    structure: Structure,
    probes: Sequence[Probe],
    pad_id: int,
    reference: RedirectReference,
) -> dict[str, Figure]:
    """Return the KL divergences of the distributions after the prompts."""
    seen = read_spots(model, structure, [spot_of(probe.source) for probe in probes], pad_id, (), (), ends=True)
    assert seen.ends is not None
    assert reference.ends is not None
    assert reference.head is not None
    figures: dict[str, Figure] = {}
    with torch.inference_mode():
        head = read_head(in_memory(model))
        values = divergence(seen.ends, head, reference.ends, reference.head).double().tolist()
    for kind, metric in METRIC_OF.items():
        if chosen := [value for value, probe in zip(values, probes, strict=True) if probe.kind == kind]:
            figures[metric] = mean_figure(chosen)
    return figures


def _written(
    model: PreTrainedModel | StreamedModel,
    structure: Structure,
    probes: Sequence[Probe],
    pad_id: int,
    reference: RedirectReference,
) -> dict[str, Figure]:
    count = len({probe.pair for probe in probes})
    if reference.block is None:
        return {"redirect.residual": mean_figure([1.0] * count), "redirect.strength": mean_figure([0.0] * count)}
    block = reference.block
    now = _states(model, structure, probes, pad_id, (block,))[block]
    before, target = reference.source[block].to(now), reference.target[block].to(now)
    way = target - before
    length = way.norm(dim=1)
    left = (target - now).norm(dim=1) / length
    gone = ((now - before) * way).sum(1) / length.square()
    return {"redirect.residual": mean_figure(left.tolist()), "redirect.strength": mean_figure(gone.tolist())}
