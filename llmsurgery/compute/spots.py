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
) -> Seen:
    """Run prompts and keep what is seen at their spots.

    Args:
        model: A causal language model in eval mode, loaded or streamed; of a streamed one later blocks are not read.
        structure: Its roles.
        spots: Prompts and tokens.
        pad_id: Token id for padding, on the right.
        keys: Matrices whose inputs are wanted, at most one of a layer.
        blocks: Blocks whose outputs are wanted.
        ends: Whether the final hidden states of the last tokens are wanted; else later blocks are not run.
        batch_rows: Prompts per forward.
    """
    plain, path = in_memory(model), blocks_path(structure)
    modules = {("key", int(target.layer or 0)): target.module for target in keys}
    modules |= {("state", block): f"{path}.{block}" for block in blocks}
    until = None if ends else max(layer for _, layer in modules)
    order = sorted(range(len(spots)), key=lambda i: (-len(spots[i].ids), i))
    parts = [order[start : start + batch_rows] for start in range(0, len(order), batch_rows)]
    found: dict[tuple[str, int], dict[int, torch.Tensor]] = {name: {} for name in modules}
    last: dict[int, torch.Tensor] = {}

    def call(part: Sequence[int]) -> None:
        def keep(name: tuple[str, int], values: torch.Tensor) -> None:
            found[name].update(zip(part, values, strict=True))

        # A forward that ends behind a block does not come back: its hooks have kept what was seen.
        final = _forward(plain, modules, [spots[i] for i in part], pad_id, keep)
        if ends:
            last.update(zip(part, final, strict=True))

    if isinstance(model, StreamedModel):
        model.run([lambda part=part: call(part) for part in parts], until)  # type: ignore[misc]
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
    spots: Sequence[Spot],
    pad_id: int,
    keep: Callable[[tuple[str, int], torch.Tensor], None],
) -> torch.Tensor:
    """Run one batch, keep what the modules see at the spots, and return the final hidden states of the last tokens."""
    lengths = torch.tensor([len(spot.ids) for spot in spots])
    ids = torch.full((len(spots), int(lengths.max())), pad_id, dtype=torch.long)
    for row, spot in enumerate(spots):
        ids[row, : len(spot.ids)] = torch.tensor(spot.ids)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    rows = torch.arange(len(spots), device=model.device)
    positions = torch.tensor([spot.position for spot in spots], device=model.device)

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
        output = backbone(model)(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state[rows, lengths.to(model.device) - 1]
    return hidden
