"""What a model computes at one token of each of some prompts: inputs of matrices, and the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import RoleTensor, Structure
from llmsurgery.compute.blocks import blocks_path, first_blocks
from llmsurgery.compute.head import backbone
from llmsurgery.compute.packing import Batch, make_batch
from llmsurgery.compute.residual import first_tensor
from llmsurgery.compute.stream import StreamedModel, in_memory

BATCH_ROWS = 32


@dataclass(frozen=True)
class Spot:
    """A prompt as token ids, and the token of it that is looked at."""

    ids: tuple[int, ...]
    position: int


@dataclass(frozen=True)
class Seen:
    """What was seen at the spots.

    Attributes:
        keys: Layer -> input of its matrix [spots, inputs], fp32.
        states: Block -> residual stream after it [spots, width], fp32.
        ends: Final hidden state of the last token of each prompt [spots, width], compute dtype; None if the forward
            ended before.
    """

    keys: dict[int, torch.Tensor]
    states: dict[int, torch.Tensor]
    ends: torch.Tensor | None


def read_spots(
    model: PreTrainedModel | StreamedModel,
    structure: Structure,
    spots: Sequence[Spot],
    pad_id: int,
    keys: Sequence[RoleTensor] = (),
    blocks: Sequence[int] = (),
    ends: bool = False,
    batch_rows: int = BATCH_ROWS,
    breaks: Sequence[int] = (),
) -> Seen:
    """Run prompts and keep what is seen at their spots.

    Tokens behind a spot are left out where nothing is wanted of them: a token sees those before it alone.

    Args:
        model: A causal language model in eval mode, loaded or streamed; of a streamed one later blocks are not read.
        structure: Its roles.
        spots: Prompts and tokens.
        pad_id: Token id for padding, on the right.
        keys: Matrices whose inputs are wanted, at most one of a layer.
        blocks: Blocks whose outputs are wanted.
        ends: Whether the final hidden states of the last tokens are wanted; else later blocks are not run.
        batch_rows: Prompts per forward.
        breaks: Numbers of prompts that begin a forward of their own.
    """
    plain, path = in_memory(model), blocks_path(structure)
    modules = {("key", int(target.layer or 0)): target.module for target in keys}
    modules |= {("state", block): f"{path}.{block}" for block in blocks}
    until = None if ends else max(layer for _, layer in modules)
    if not ends:
        spots = [Spot(spot.ids[: spot.position + 1], spot.position) for spot in spots]
    parts: list[list[int]] = []
    for first, end in zip((0, *breaks), (*breaks, len(spots)), strict=True):
        order = sorted(range(first, end), key=lambda i: (-len(spots[i].ids), i))
        parts += [order[start : start + batch_rows] for start in range(0, len(order), batch_rows)]
    found: dict[tuple[str, int], dict[int, torch.Tensor]] = {name: {} for name in modules}
    last: dict[int, torch.Tensor] = {}

    def call(part: Sequence[int]) -> None:
        def keep(name: tuple[str, int], values: torch.Tensor) -> None:
            found[name].update(zip(part, values, strict=True))

        # A forward that ends behind a block does not come back: its hooks have kept what was seen.
        rows = [spots[i] for i in part]
        batch = make_batch(plain, [spot.ids for spot in rows], [spot.position for spot in rows], pad_id)
        final = _forward(plain, modules, batch, keep)
        if ends:
            last.update(zip(part, final, strict=True))

    if isinstance(model, StreamedModel):
        since = min((layer for _, layer in modules), default=None)
        model.run([lambda part=part: call(part) for part in parts], until, since=since)  # type: ignore[misc]
    else:
        count = structure.layers if until is None else until + 1
        with torch.inference_mode(), first_blocks(plain, structure, count):
            for part in parts:
                call(part)

    def stack(values: Mapping[int, torch.Tensor]) -> torch.Tensor:
        return torch.stack([values[i] for i in range(len(spots))])

    kept = {name: stack(values) for name, values in found.items()}
    return Seen(
        {layer: values for (kind, layer), values in kept.items() if kind == "key"},
        {layer: values for (kind, layer), values in kept.items() if kind == "state"},
        stack(last) if ends else None,
    )


def _forward(
    model: PreTrainedModel,
    modules: Mapping[tuple[str, int], str],
    batch: Batch,
    keep: Callable[[tuple[str, int], torch.Tensor], None],
) -> torch.Tensor:
    """Run one batch, keep what the modules see at the spots, and return the final hidden states of the last tokens."""
    rows, positions = batch.rows, batch.positions

    def before(name: tuple[str, int]) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            keep(name, arguments[0][rows, positions].float())

        return hook

    def after(name: tuple[str, int]) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, _arguments: object, output: object) -> None:
            keep(name, first_tensor(output)[rows, positions].float())

        return hook

    with ExitStack() as stack:
        for name, path in modules.items():
            module = model.get_submodule(path)
            handle = (
                module.register_forward_pre_hook(before(name))
                if name[0] == "key"
                else module.register_forward_hook(after(name))
            )
            stack.callback(handle.remove)
        output = backbone(model)(**batch.inputs, use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state[rows, batch.ends]
    return hidden
