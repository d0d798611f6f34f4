"""The value to write: a vector which, put at one token's place, makes the model say something.

As in ROME ("Locating and Editing Factual Associations in GPT", arXiv 2202.05262), MEMIT (arXiv 2210.07229) and ROCR
(arXiv 2506.07795): with v0 the present value at the lookup token of the bare prompt, Adam finds delta, which is added
to the output of a module at the lookup token of every context,

    loss = mean over contexts of -(1/|o|) sum log p(o_t)  +  kl * KL(p_0 || p_delta)  +  decay * |delta| / |v0|^2

The divergence is taken at the lookup token of a further prompt ("{subject} is a"), and after every step delta is cut
down to `clamp` |v0|. Note |delta| and not its square, as in the released code. With objective "entropy" the first term
is KL(p || uniform) = log V - H(p): its minimum is the answer about which nothing is known.

The blocks before the module see the same inputs in every step: they run once, and are skipped from then on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import Structure
from llmsurgery.compute.blocks import blocks_path, skipped_blocks
from llmsurgery.compute.divergence import divergence
from llmsurgery.compute.head import final_hidden, label_log_probabilities, read_head
from llmsurgery.compute.uniform import missing_entropy
from llmsurgery.errors import DivergedError, UnsupportedError, unknown_name
from llmsurgery.train.value_config import ValueConfig

SITES = ("mlp", "block")
OBJECTIVES = ("target", "entropy")
BATCH_ROWS = 32


@dataclass(frozen=True)
class ValueContext:
    """A prompt, perhaps with an answer, and the token at which a value is put.

    Attributes:
        ids: Token ids, without padding.
        position: Index of the lookup token.
        start: Index of the first answer token; len(ids) without an answer: the last token's prediction counts.
    """

    ids: tuple[int, ...]
    position: int
    start: int

    @property
    def predicting(self) -> range:
        """Positions whose predictions count."""
        return range(self.start - 1, max(self.start, len(self.ids) - 1))


@dataclass(frozen=True)
class _Part:
    """Contexts that run at once.

    Attributes:
        ids: Token ids [batch, time], right-padded.
        mask: 1 for tokens [batch, time].
        spots: Index of the lookup token [batch].
        rows: Row of every prediction that counts [predictions].
        columns: Its position [predictions].
        labels: The tokens to predict [predictions]; 0 where there is none.
        weights: Share of each prediction in the mean over contexts and tokens [predictions].
        entering: What enters the module's block [batch, time, width].
    """

    ids: torch.Tensor
    mask: torch.Tensor
    spots: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    entering: torch.Tensor | None = None


def site_module(structure: Structure, site: str, layer: int) -> str:
    """Return the path of the module whose output holds the value: the last matrix of the MLP, or the block.

    Raises:
        UsageError: An unknown site, or a layer that does not exist.
        UnsupportedError: The MLP of this block has no single last matrix.
    """
    if site not in SITES:
        raise unknown_name("site", site, SITES)
    structure.select(("all",), (layer,))
    if site == "block":
        return f"{blocks_path(structure)}.{layer}"
    for tensor in structure.tensors:
        if tensor.role == "mlp.down" and tensor.layer == layer and tensor.part == "weight":
            return tensor.module
    raise UnsupportedError(
        f"the MLP of block {layer} is no single memory",
        "it has routed experts, each with a last matrix of its own",
        "choose another layer with --set layers=..., or another method",
    )


def optimise_value(
    model: PreTrainedModel,
    structure: Structure,
    site: str,
    layer: int,
    contexts: Sequence[ValueContext],
    config: ValueConfig,
    pad_id: int,
    kl_context: ValueContext | None = None,
    objective: str = "target",
    batch_rows: int = BATCH_ROWS,
) -> tuple[torch.Tensor, dict[str, object]]:
    """Return the value that makes a model say something.

    Args:
        model: A causal language model in eval mode; nothing of it changes.
        structure: Its roles.
        site: "mlp": the value is the output of the MLP's last matrix, its bias included; "block": that of the block.
        layer: Number of the block.
        contexts: At least one; the first is the bare prompt, whose present value is v0.
        config: Steps, step size, weights and bound.
        pad_id: Token id for padding.
        kl_context: The prompt whose prediction at the lookup token is to stay; None: no such term.
        objective: "target": say what follows `start` in each context; "entropy": know nothing there.
        batch_rows: Contexts per forward.

    Returns:
        v0 + delta [width], fp32, and the facts of the search for the manifest.

    Raises:
        UsageError: An unknown site, objective or layer.
        UnsupportedError: The MLP of this block has no single last matrix, or its output is zero.
        DivergedError: The loss is not finite.
    """
    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    module = model.get_submodule(site_module(structure, site, layer))
    parts = [
        _collate(contexts[start : start + batch_rows], len(contexts), pad_id, model.device)
        for start in range(0, len(contexts), batch_rows)
    ]
    kept = None if kl_context is None or not config.value_kl else _collate([kl_context], 1, pad_id, model.device)
    with _without_gradients(model):
        search = _Search(model, structure, module, layer, config, objective)
        with torch.no_grad():
            start = search.value_at(parts[0])
            parts = [search.with_entering(part) for part in parts]
            reference = None
            if kept is not None:
                kept = search.with_entering(kept)
                reference = search.hidden(kept, None)[:, kept.spots[0]].clone()
        length = float(start.norm())
        if not length:
            raise UnsupportedError(f"the value at block {layer} is zero", "no length to measure a change by", "")
        return _descend(search, parts, kept, reference, start, length)


def _descend(
    search: _Search,
    parts: Sequence[_Part],
    kept: _Part | None,
    reference: torch.Tensor | None,
    start: torch.Tensor,
    length: float,
) -> tuple[torch.Tensor, dict[str, object]]:
    """Run Adam on delta."""
    config = search.config
    delta = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=config.value_lr)
    first: float | None = None
    step = 0
    while True:
        optimizer.zero_grad()
        answer = 0.0
        for part in parts:
            term = search.answer_loss(part, delta)
            term.backward()  # type: ignore[no-untyped-call]
            answer += float(term.detach())
        drift = 0.0
        if kept is not None and reference is not None:
            term = config.value_kl * search.divergence(kept, delta, reference)
            term.backward()  # type: ignore[no-untyped-call]
            drift = float(term.detach())
        decay = config.value_decay * delta.norm() / length**2
        decay.backward()
        loss = answer + drift + float(decay.detach())
        if not math.isfinite(loss):
            raise DivergedError(
                f"the search for a value diverged at step {step}", f"its loss is {loss}", "lower --set value_lr=..."
            )
        first = loss if first is None else first
        if loss < config.value_tolerance or step == config.value_steps:
            break
        optimizer.step()
        step += 1
        with torch.no_grad():
            delta *= min(1.0, config.value_clamp * length / max(float(delta.norm()), 1e-30))
    record: dict[str, object] = {
        "steps": step,
        "stopped": "tolerance" if loss < config.value_tolerance else "steps",
        "loss": {"first": first, "last": loss},
        "answer_loss": answer,
        "kl": drift / config.value_kl if kept is not None else None,
        "delta_norm": float(delta.detach().norm()),
        "value_norm": length,
    }
    return (start + delta).detach(), record


@dataclass(frozen=True)
class _Search:
    """A model with a vector added to one module's output at one token of every row."""

    model: PreTrainedModel
    structure: Structure
    module: torch.nn.Module
    layer: int
    config: ValueConfig
    objective: str

    def value_at(self, part: _Part) -> torch.Tensor:
        """Return v0 [width], fp32: the module's output at the lookup token of the first row."""
        caught: list[torch.Tensor] = []

        def catch(_module: torch.nn.Module, _inputs: object, output: Any) -> None:
            caught.append((output[0] if isinstance(output, tuple) else output)[0, part.spots[0]])

        with _hooked(self.module.register_forward_hook(catch)):
            final_hidden(self.model, part.ids[:1], part.mask[:1])
        return caught[0].float().clone()

    def with_entering(self, part: _Part) -> _Part:
        """Return the rows with what enters the module's block."""
        caught: list[torch.Tensor] = []

        def catch(_module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            caught.append(arguments[0] if arguments else keywords["hidden_states"])

        block = self.model.get_submodule(f"{blocks_path(self.structure)}.{self.layer}")
        with _hooked(block.register_forward_pre_hook(catch, with_kwargs=True)):
            final_hidden(self.model, part.ids, part.mask)
        return _Part(**{**vars(part), "entering": caught[0].clone()})

    def hidden(self, part: _Part, delta: torch.Tensor | None) -> torch.Tensor:
        """Return the final hidden states of some rows [batch, time, width] with delta added, out of place."""
        assert part.entering is not None
        rows = torch.arange(len(part.ids), device=part.ids.device)

        def add(_module: torch.nn.Module, _inputs: object, output: Any) -> Any:
            if delta is None:
                return output
            states = output[0] if isinstance(output, tuple) else output
            change = torch.zeros_like(states).index_put(
                (rows, part.spots), delta.to(states.dtype).expand(len(rows), -1)
            )
            return (states + change, *output[1:]) if isinstance(output, tuple) else states + change

        with (
            skipped_blocks(self.model, blocks_path(self.structure), self.layer, part.entering),
            _hooked(self.module.register_forward_hook(add)),
        ):
            return final_hidden(self.model, part.ids, part.mask)

    def answer_loss(self, part: _Part, delta: torch.Tensor) -> torch.Tensor:
        """Return these rows' part of the mean over contexts [], fp32."""
        states = self.hidden(part, delta)[part.rows, part.columns]
        if self.objective == "target":
            terms = -label_log_probabilities(states, read_head(self.model), part.labels)
        else:
            terms = missing_entropy(states, read_head(self.model))
        return (part.weights * terms).sum()

    def divergence(self, part: _Part, delta: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Return KL(p_0 || p_delta) at the lookup token of one row [], fp32."""
        head = read_head(self.model)
        return divergence(self.hidden(part, delta)[:, part.spots[0]], head, reference, head).sum()


def _collate(contexts: Sequence[ValueContext], count: int, pad_id: int, device: torch.device) -> _Part:
    """Pad contexts on the right; `count` is the number of contexts in all."""
    time = max(len(context.ids) for context in contexts)
    ids = torch.full((len(contexts), time), pad_id)
    mask = torch.zeros_like(ids)
    cells: list[tuple[int, int, int, float]] = []
    for row, context in enumerate(contexts):
        ids[row, : len(context.ids)] = torch.tensor(context.ids)
        mask[row, : len(context.ids)] = 1
        spots = context.predicting
        follows = (*context.ids, 0)
        cells += [(row, spot, follows[spot + 1], 1 / (count * len(spots))) for spot in spots]
    rows, columns, labels, weights = (torch.tensor(column, device=device) for column in zip(*cells, strict=True))
    places = torch.tensor([context.position for context in contexts], device=device)
    return _Part(ids.to(device), mask.to(device), places, rows, columns, labels, weights)


@contextmanager
def _hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _without_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Keep no activations for the gradients of weights."""
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in moving:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in moving:
            parameter.requires_grad_(True)
