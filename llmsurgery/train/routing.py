"""What the routers of a mixture of experts do with some rows: scores, the experts that rows use, routing rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import RoleTensor
from llmsurgery.compute.head import final_hidden
from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import Encoded
from llmsurgery.data.collate import collate, length_buckets

_ROWS = 8
"""Rows per forward."""


def gating_scores(logits: torch.Tensor, scoring: str) -> torch.Tensor:
    """Return the probability of every expert [tokens, experts], fp32, before any choice of the best.

    Args:
        logits: What the router computes [tokens, experts].
        scoring: "softmax", or "sigmoid" for routers that score each expert by itself; those scores are divided by their
            sum, so that blocks and families compare.
    """
    if scoring == "softmax":
        return logits.float().softmax(-1)
    scores = logits.float().sigmoid()
    return scores / scores.sum(-1, keepdim=True)


def masked_scores(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the scores of the experts that a token is sent to, and 0 for the others.

    Args:
        scores: Scores [tokens, experts].
        chosen: Numbers of the chosen experts [tokens, k].
    """
    return torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))


@torch.no_grad()
def affinities(
    model: PreTrainedModel,
    routers: Mapping[int, RoleTensor],
    scoring: str,
    rows: Sequence[Encoded],
    pad_id: int,
    progress: Progress,
) -> dict[int, torch.Tensor]:
    """Return how much some rows use each expert: a mean over rows of the mean over tokens of the masked score.

    Args:
        model: The model, in eval mode.
        routers: Block number -> the weight of its router.
        scoring: As for `gating_scores`.
        rows: Encoded rows; every token but padding counts.
        pad_id: Token id for padding.
        progress: Told of every row.

    Returns:
        Block number -> affinities [experts], fp64, on the CPU.
    """
    totals: dict[int, torch.Tensor] = {}
    with progress.task("attributing rows to experts", len(rows)) as tick:
        for indices in length_buckets(rows, _ROWS):
            batch = collate([rows[i] for i in indices], pad_id, model.device)
            with _watched(model, routers) as seen:
                final_hidden(model, batch.input_ids, batch.attention_mask)
            mask = batch.attention_mask.bool()
            for layer, (_, logits, chosen) in seen.items():
                scores = masked_scores(gating_scores(logits, scoring), chosen)
                per_row = (scores.view(*mask.shape, -1) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                total = per_row.double().sum(0).cpu()
                totals[layer] = totals[layer] + total if layer in totals else total
            tick(len(indices))
    return {layer: total / len(rows) for layer, total in totals.items()}


@torch.no_grad()
def router_inputs(
    model: PreTrainedModel, router: RoleTensor, rows: Sequence[Encoded], pad_id: int, progress: Progress
) -> list[torch.Tensor]:
    """Return what a router sees of each row [tokens, width], in the compute dtype, on the CPU.

    It does not change as long as nothing below the router's block or in its attention moves.

    Args:
        model: The model, in eval mode.
        router: The weight of the router.
        rows: Encoded rows.
        pad_id: Token id for padding.
        progress: Told of every row.
    """
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    with progress.task("recording the router's inputs", len(rows)) as tick:
        for indices in length_buckets(rows, _ROWS):
            batch = collate([rows[i] for i in indices], pad_id, model.device)
            with _watched(model, {0: router}) as seen:
                final_hidden(model, batch.input_ids, batch.attention_mask)
            inputs = seen[0][0].view(*batch.input_ids.shape, -1)
            for position, index in enumerate(indices):
                found[index] = inputs[position, : len(rows[index].ids)].cpu()
            tick(len(indices))
    return found


def route(model: PreTrainedModel, router: RoleTensor, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [tokens, experts] and chosen experts [tokens, k] of a router as it is now, in its weight's dtype.

    Some families compute in fp32 whatever they are given, the others need their inputs in the dtype of the weight: that
    of the model before training, fp32 while the router is trained.
    """
    module = model.get_submodule(router.module)
    logits, _, chosen = module(inputs.to(model.device, module.get_parameter(router.part).dtype))
    return logits, chosen


@torch.no_grad()
def routing_rate(model: PreTrainedModel, router: RoleTensor, inputs: Sequence[torch.Tensor], expert: int) -> float:
    """Return the share of tokens that a router sends to an expert, among others.

    Args:
        model: The model.
        router: The weight of the router.
        inputs: What the router sees of each row, as `router_inputs` gives it.
        expert: Number of the expert.
    """
    sent = [(route(model, router, part)[1] == expert).any(-1) for part in inputs]
    return float(torch.cat(sent).double().mean())


def switch_off_jitter(model: PreTrainedModel) -> None:
    """Let routers in training see what they see in use: some families multiply their inputs with noise."""
    for module in model.modules():
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.0


@contextmanager
def _watched(
    model: PreTrainedModel, routers: Mapping[int, RoleTensor]
) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Yield block number -> inputs, logits and chosen experts of its router in the forward inside the block.

    A hook rather than `output_router_logits`, whose tuple skips dense blocks and lacks the choice.
    """
    seen: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def watch(layer: int, router: RoleTensor) -> torch.utils.hooks.RemovableHandle:
        def after(
            _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]
        ) -> None:
            logits, _, chosen = outputs
            seen[layer] = inputs[0].reshape(-1, inputs[0].shape[-1]), logits, chosen

        module: torch.nn.Module = model.get_submodule(router.module)
        handle: torch.utils.hooks.RemovableHandle = module.register_forward_hook(after)
        return handle

    handles = [watch(layer, router) for layer, router in routers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
