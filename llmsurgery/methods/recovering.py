"""What the methods of `recover-alignment` share: what they may change, edits, and the controls that every report shows.

A repair is judged by what the same amount of change reaches in another way. With a the aligned and b the fine-tuned
model, and what is removed of b - a measured as |result - b| / |a - b| over all weights:

    random-restore   as many entries, drawn at random, go back to a
    interpolate      a + (1 - removed) (b - a)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.edits.kinds import Edit, Sparse
    from llmsurgery.methods.base import Operation

Values = Callable[["RoleTensor"], "torch.Tensor"]
"""Returns the values of a tensor, float32, in the stored shape."""


def searched_targets(structure: Structure, blocks: int | None = None) -> list[RoleTensor]:
    """Return every weight and bias of the first blocks but those of norms.

    Norms are known by their role: names such as `q_norm` say nothing that all families share.

    Args:
        structure: The checkpoint's roles.
        blocks: How many blocks; None for floor(2n/3).

    Raises:
        UsageError: The model has fewer blocks.
    """
    from llmsurgery.errors import UsageError

    count = blocks or default_blocks(structure.layers)
    if count > structure.layers:
        raise UsageError(
            f"blocks={count} are too many", f"the model has {structure.layers}", "lower blocks, or leave it out"
        )
    chosen = [
        tensor
        for tensor in structure.tensors
        if tensor.layer is not None
        and tensor.layer < count
        and tensor.part in ("weight", "bias")
        and not tensor.role.startswith("norm.")
    ]
    return sorted(chosen, key=lambda tensor: tensor.layer or 0)


def default_blocks(layers: int) -> int:
    """Return floor(2n/3) of n blocks, at least one."""
    return max(1, 2 * layers // 3)


def block_parameters(structure: Structure) -> int:
    """Return N: the parameters of all blocks, norms included."""
    return sum(tensor.parameters for tensor in structure.tensors if tensor.layer is not None)


def own_values(operation: Operation, target: RoleTensor) -> torch.Tensor:
    """Return the fine-tuned model's values, float32, in the stored shape."""
    import torch

    return torch.from_numpy(operation.read(target.stored))


def other_values(operation: Operation, name: str, target: RoleTensor) -> torch.Tensor:
    """Return a further model's values, float32, in the stored shape."""
    import torch

    return torch.from_numpy(operation.models[name].read(target.stored))


def write_live(operation: Operation, target: RoleTensor, values: torch.Tensor) -> None:
    """Set a tensor of the model in memory."""
    import torch

    from llmsurgery.compute.view import weight_view

    view = weight_view(operation.model, target)
    with torch.no_grad():
        view.copy_(values.to(view.device, view.dtype))


def sparse_edit(target: RoleTensor, places: torch.Tensor, values: torch.Tensor) -> Sparse:
    """Return the edit that sets some entries.

    Args:
        target: The tensor.
        places: Flat indices, ascending.
        values: What goes there.
    """
    from llmsurgery.edits.kinds import Sparse

    return Sparse(target.stored, places.numpy(), values.numpy())


def restored_edits(
    operation: Operation, targets: Sequence[RoleTensor], masks: Iterable[torch.Tensor]
) -> tuple[list[Edit], list[RoleTensor], dict[str, int]]:
    """Return the edits that set entries to the aligned model's values, their tensors, and how many of each.

    Args:
        operation: What the method is given.
        targets: The tensors.
        masks: For each, which entries go back, flat.
    """
    edits: list[Edit] = []
    changed: list[RoleTensor] = []
    counts: dict[str, int] = {}
    for target, mask in zip(targets, masks, strict=True):
        places = mask.nonzero().flatten()
        if len(places):
            values = other_values(operation, "aligned", target).reshape(-1)[places]
            edits.append(sparse_edit(target, places, values))
            changed.append(target)
            counts[target.stored] = len(places)
    return edits, changed, counts


def comparable(operation: Operation) -> list[RoleTensor]:
    """Return every weight and bias that both models store; a head of its own may be missing in one of them."""
    stored = operation.models["aligned"].stored
    tensors = operation.structure.tensors
    return [tensor for tensor in tensors if tensor.part in ("weight", "bias") and tensor.stored in stored]


def removed_share(operation: Operation, result: Values, changed: Sequence[RoleTensor]) -> tuple[float, int]:
    """Return |result - b| / |a - b| over all weights, and how many entries of the result differ from b.

    Args:
        operation: What the method is given.
        result: Values of the tensors that change.
        changed: These tensors.
    """
    names = {target.stored for target in changed}
    moved, whole, entries = 0.0, 0.0, 0
    for target in comparable(operation):
        own = own_values(operation, target).double()
        whole += float((other_values(operation, "aligned", target).double() - own).square().sum())
        if target.stored in names:
            change = result(target).double() - own
            moved += float(change.square().sum())
            entries += int((change != 0).sum())
    return (math.sqrt(moved / whole) if whole else 0.0), entries


def stored_only(operation: Operation) -> Operation:
    """Return an operation that reads what is stored and has no model in memory; what outlives a run may hold it."""
    nothing: Any = None
    return replace(operation, model=nothing, training=nothing, recovery=None, streamed=None)


def last_held(values: Values) -> Values:
    """Return a function that gives the same values and holds those of the last tensor alone."""
    held: dict[str, torch.Tensor] = {}

    def get(target: RoleTensor) -> torch.Tensor:
        if target.stored not in held:
            held.clear()
            held[target.stored] = values(target)
        return held[target.stored]

    return get


def moved_tensors(
    operation: Operation, targets: Sequence[RoleTensor], result: Values
) -> tuple[list[RoleTensor], float, int]:
    """Return the tensors that change, and what `removed_share` says of the change.

    Args:
        operation: What the method is given.
        targets: Tensors that may change.
        result: Values of them.
    """
    changed: list[RoleTensor] = []

    def noted(target: RoleTensor) -> torch.Tensor:
        values = result(target)
        if bool((values != own_values(operation, target)).any()):
            changed.append(target)
        return values

    removed, entries = removed_share(operation, noted, targets)
    return changed, removed, entries


def computed_edits(targets: Sequence[RoleTensor], result: Values) -> list[Edit]:
    """Return edits whose values are computed tensor by tensor when they are written, so that none is held."""
    from llmsurgery.edits.kinds import Replace
    from llmsurgery.edits.rows import ComputedRows

    def rows(target: RoleTensor) -> Any:
        return ComputedRows(target.shape, lambda: result(target).numpy())

    return [Replace(target.stored, rows(target)) for target in targets]


def random_masks(
    operation: Operation, targets: Sequence[RoleTensor], count: int, seed: int, largest: bool = False
) -> list[torch.Tensor]:
    """Choose entries in which the models differ, at random or by the largest difference.

    Args:
        operation: What the method is given.
        targets: The tensors.
        count: How many at most.
        seed: Seed of the draw.
        largest: Take those with the largest |b - a|.

    Returns:
        One flat mask per tensor.
    """
    import torch

    from llmsurgery.compute.largest import Largest

    generator = torch.Generator().manual_seed(seed)
    found = Largest(count)
    for number, target in enumerate(targets):
        gap = (own_values(operation, target) - other_values(operation, "aligned", target)).reshape(-1).abs()
        places = gap.nonzero().flatten()
        values = gap[places] if largest else torch.rand(len(places), generator=generator)
        found.add(number, values, places)
    masks = [torch.zeros(target.parameters, dtype=torch.bool) for target in targets]
    for number, mask in enumerate(masks):
        mask[found.of(number)] = True
    return masks


def controls(
    operation: Operation,
    targets: Sequence[RoleTensor],
    removed: float,
    entries: int,
    wanted: bool = True,
    dense: bool = False,
) -> dict[str, object]:
    """Return what a random restoration and an interpolation of the same size reach; the model in memory is changed.

    Args:
        operation: What the method is given.
        targets: Tensors that the random restoration draws from.
        removed: Share of the difference that the result removes.
        entries: Entries that the result changes.
        wanted: Whether the controls are wanted.
        dense: Whether it changes nearly all of them a little; then the random restoration takes as many as remove the
            same share, were the difference spread evenly.
    """
    record: dict[str, object] = {"removed": removed, "entries": entries}
    recovery = operation.recovery
    if not wanted or recovery is None or not (recovery.prompts.harmful or recovery.prompts.task):
        return record
    with operation.progress.task("controls", 2) as tick:
        count = round(entries * min(1.0, removed) ** 2) if dense else entries
        masks = random_masks(operation, targets, count, operation.seed)
        set_live(operation, _mixed(operation, targets, masks))
        drawn = sum(int(mask.sum()) for mask in masks)
        record["random-restore"] = {"entries": drawn, **recovery.quick(operation.model)}
        tick()
        keep = max(0.0, 1.0 - removed)
        set_live(operation, interpolated(operation, keep))
        record["interpolate"] = {"keep": keep, **recovery.quick(operation.model)}
        tick()
    return record


def interpolated(operation: Operation, keep: float) -> Iterator[tuple[RoleTensor, torch.Tensor]]:
    """Yield every tensor with a + keep (b - a), in float64 rounded to float32."""
    for target in comparable(operation):
        yield target, interpolated_values(operation, target, keep)


def interpolated_values(operation: Operation, target: RoleTensor, keep: float) -> torch.Tensor:
    """Return a + keep (b - a) of one tensor, in float64 rounded to float32."""
    aligned = other_values(operation, "aligned", target).double()
    return (aligned + keep * (own_values(operation, target).double() - aligned)).float()


def _mixed(
    operation: Operation, targets: Sequence[RoleTensor], masks: Sequence[torch.Tensor]
) -> Iterator[tuple[RoleTensor, torch.Tensor]]:
    """Yield every tensor as the fine-tuned model has it, with the masked entries of the aligned one."""
    chosen = {target.stored: mask for target, mask in zip(targets, masks, strict=True)}
    for target in comparable(operation):
        own = own_values(operation, target)
        mask = chosen.get(target.stored)
        if mask is not None:
            own = own.where(~mask.view(own.shape), other_values(operation, "aligned", target))
        yield target, own


def set_live(operation: Operation, values: Iterable[tuple[RoleTensor, torch.Tensor]]) -> None:
    """Set tensors of the model in memory."""
    for target, value in values:
        write_live(operation, target, value)


def task_floor(operation: Operation, drop: float) -> tuple[float | None, float | None]:
    """Return the fine-tuned model's task score and the least that a result may have; None without task rows."""
    recovery = operation.recovery
    if recovery is None or not recovery.prompts.task:
        return None, None
    score = recovery.quick(operation.model)["task.score"]
    return score, (1 - drop) * score
