"""What methods that zero weights share: calibration, the walk over the blocks, the edits and what is said of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

from llmsurgery.methods.amounts import Amount, AmountConfig
from llmsurgery.methods.base import MethodResult, Operation
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor
    from llmsurgery.compute.inputs import Statistic
    from llmsurgery.compute.walk import BlockWalk
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.data.windows import Window
    from llmsurgery.edits.kinds import Edit
    from llmsurgery.edits.rows import StoredRows
    from llmsurgery.methods.kept_blocks import KeptBlocks

MANY_PASSES = 30
"""Passes over the data that are worth a notice."""

NO_SPEED = (
    "zeros are stored like any other value: neither the file nor inference becomes smaller or faster without a runtime "
    "for sparse weights"
)
RECORD = "sparsity.json"
"""File beside the result with the share of zeros of every matrix."""


@dataclass(frozen=True)
class CalibrationConfig:
    """The text that activations are taken from."""

    samples: int = option(32, "windows of --calibration at most", minimum=1)
    window: int = option(512, "tokens of a window, at most the model's context", minimum=2)


def calibration_windows(
    config: CalibrationConfig, encoder: Encoder, rows: Sequence[Row], name: str = "calibration"
) -> list[Window]:
    """Return the windows that activations are taken from.

    Raises:
        InputError: The rows have fewer tokens than one window.
    """
    from llmsurgery.data.windows import pack_windows

    return pack_windows(encoder, rows, min(config.window, encoder.max_length), config.samples, name)


def tell_of_windows(operation: Operation, config: CalibrationConfig, windows: Sequence[Window], name: str) -> None:
    """Say so where the text gives fewer windows than asked for."""
    if len(windows) < config.samples:
        operation.progress.notice(
            f"--{name} gives {len(windows)} windows of {len(windows[0])} tokens, {config.samples} were asked for"
        )


def answers_and_text(
    encoder: Encoder, rows: Sequence[Row], longest: int, cut: Callable[[Sequence[Row]], Sequence[Window]]
) -> list[Encoded]:
    """Return questions and chats with their answers, and plain text in pieces of which every token counts.

    Args:
        encoder: The model's encoder.
        rows: Rows of --calibration.
        longest: Tokens of a question or chat at most.
        cut: Cuts rows of plain text, of which there are some.

    Raises:
        InputError: A question or chat is too long.
    """
    from llmsurgery.data.chat import Encoded

    asked = [encoder.encode(row, None, longest) for row in rows if row.kind != "text"]
    texts = [row for row in rows if row.kind == "text"]
    pieces = cut(texts) if texts else ()
    return [*asked, *(Encoded(piece, 1, False, "calibration") for piece in pieces)]


def tell_of_repeats(operation: Operation, passes: float) -> None:
    """Say so where the data are few for so many steps."""
    if passes > MANY_PASSES:
        operation.progress.notice(
            f"every row of --calibration is trained on {passes:.0f} times: other text will suffer; give more of it"
        )


def walk_of(operation: Operation, windows: Sequence[Window]) -> BlockWalk:
    """Return the walk of some windows through the model; `--batch-size` says how many of them run at once."""
    import torch

    from llmsurgery.compute.walk import BlockWalk

    rows = operation.training.micro_batch or 4
    batches = [torch.tensor(windows[start : start + rows]) for start in range(0, len(windows), rows)]
    return BlockWalk(operation.streamed or operation.model, operation.structure, batches)


def stored_matrix(operation: Operation, target: RoleTensor) -> torch.Tensor:
    """Return a stored matrix as W [outputs, inputs], fp32, on the model's device."""
    import torch

    values = torch.from_numpy(operation.read(target.stored)).to(operation.model.device)
    return values.T if target.transposed else values


Prune = Callable[["RoleTensor", "torch.Tensor", Any], "torch.Tensor"]
"""Returns, given W [outputs, inputs] in fp32 and the statistic of its inputs, what becomes of it: bool, True where an
entry is zeroed, or new values, both [outputs, inputs]."""


@dataclass
class Pruned:
    """What was made of some matrices.

    Attributes:
        edits: One edit per matrix.
        zeros: Stored name -> number of zeros of the matrix as it will be stored.
    """

    edits: list[Edit] = field(default_factory=list)
    zeros: dict[str, int] = field(default_factory=dict)

    def add(
        self, target: RoleTensor, made: torch.Tensor, weight: torch.Tensor, rows: StoredRows | None = None
    ) -> torch.Tensor:
        """Take in what became of one matrix.

        Args:
            target: The matrix.
            made: What `as_stored` made of it.
            weight: W [outputs, inputs], fp32.
            rows: New values that lie elsewhere; without them memory holds them.

        Returns:
            Its values as they will be stored, [outputs, inputs], fp32.
        """
        import torch

        from llmsurgery.edits.kinds import Mask, Replace
        from llmsurgery.edits.rows import PackedMask, StoredRows

        edit: Edit
        if made.dtype == torch.bool:
            edit = Mask(target.stored, cast(Any, PackedMask.of((~made).cpu().numpy())))
            # Of a run that goes on, masks come from a file.
            values = weight.masked_fill(_oriented(made, target).to(weight.device), 0)
        else:
            rows = rows or StoredRows.of(made.float().cpu().numpy(), target.dtype)
            edit = Replace(target.stored, cast(Any, rows))
            values = _oriented(made.to(weight), target)
        self.edits.append(edit)
        self.zeros[target.stored] = int((values == 0).sum())
        return values


def _oriented(values: torch.Tensor, target: RoleTensor) -> torch.Tensor:
    """Turn [outputs, inputs] into the stored orientation, or back."""
    return values.T if target.transposed else values


def prune_each(
    operation: Operation, targets: Sequence[RoleTensor], prune: Prune, kept: KeptBlocks | None = None
) -> Pruned:
    """Prune matrices one by one, from what is stored alone.

    Args:
        operation: What the method is given.
        targets: The matrices, in order of layer.
        prune: Prunes one matrix.
        kept: Masks of the blocks that a killed run has pruned already; None prunes all of them.
    """
    pruned = Pruned()
    with operation.progress.task("pruning", len(targets)) as tick:
        for layer, group in groupby(targets, key=lambda target: int(target.layer or 0)):
            members = list(group)
            earlier = None if kept is None else kept.load(layer, members)
            found: dict[str, torch.Tensor] = {}
            for target in members:
                weight = stored_matrix(operation, target)
                if earlier is None:
                    made = as_stored(prune(target, weight, None), target)
                else:
                    made = earlier[target.stored]
                pruned.add(target, made, weight)
                if kept is not None and earlier is None:
                    found[target.stored] = made
                tick()
            if kept is not None and earlier is None:
                kept.save(layer, found)
    return pruned


def prune_blocks(
    operation: Operation,
    targets: Sequence[RoleTensor],
    windows: Sequence[Window],
    make: Callable[[int], Statistic],
    prune: Prune,
) -> Pruned:
    """Prune block by block; every block sees what the pruned blocks before it put out.

    Within a block all statistics come from before any pruning in it. One block, the activations of all windows, the
    statistics of one block and one bit for each entry that a mask zeroes are in memory; new values lie in the state of
    the run. Of a loaded model all blocks are there anyway, and they are changed.

    Args:
        operation: What the method is given.
        targets: The matrices.
        windows: Calibration windows.
        make: Makes an empty statistic of inputs of some width.
        prune: Prunes one matrix.
    """
    from llmsurgery.compute.inputs import watched_inputs
    from llmsurgery.compute.view import weight_view
    from llmsurgery.methods.kept_blocks import KeptBlocks

    by_layer: dict[int, list[RoleTensor]] = defaultdict(list)
    for target in targets:
        by_layer[int(target.layer or 0)].append(target)
    last, pruned, kept = max(by_layer), Pruned(), KeptBlocks(operation.training.store)
    walk = walk_of(operation, windows)
    with operation.progress.task("pruning blocks", last + 1) as tick:
        for layer in range(last + 1):
            members = by_layer.get(layer, [])
            with walk.held():
                made = kept.load(layer, members)
                if members and made is None:
                    with watched_inputs(operation.model, operation.structure, members, make, walk.block) as statistic:
                        walk.look()
                    made = {
                        target.stored: as_stored(
                            prune(target, stored_matrix(operation, target), statistic(target)), target
                        )
                        for target in members
                    }
                    del statistic
                    kept.save(layer, made)
                for target in members:
                    assert made is not None
                    found = made.pop(target.stored)
                    values = pruned.add(
                        target, found, stored_matrix(operation, target), kept.rows(layer, target, found)
                    )
                    weight_view(operation.model, target).copy_(_oriented(values, target))
                if layer < last:
                    walk.advance()
            tick()
    return pruned


def as_stored(made: torch.Tensor, target: RoleTensor) -> torch.Tensor:
    """Return what became of a matrix [outputs, inputs] in the stored orientation, new values in the stored dtype."""
    import torch

    from llmsurgery.compute.load import STORED

    values = _oriented(made, target).contiguous()
    return values if values.dtype == torch.bool else values.to(STORED[target.dtype])


def magnitude_mask(weight: torch.Tensor, amount: Amount) -> torch.Tensor:
    """Mark the entries of smallest |W|: of the whole matrix, or of each group of a pattern."""
    from llmsurgery.compute.select import share_of, smallest_of_all, smallest_of_groups

    if amount.group is not None:
        return smallest_of_groups(weight.abs(), *amount.group)
    return smallest_of_all(weight.abs(), share_of(amount.share, weight.numel()))


def pruned_result(
    operation: Operation,
    config: AmountConfig,
    amount: Amount,
    targets: Sequence[RoleTensor],
    pruned: Pruned,
    record: Mapping[str, object],
) -> MethodResult:
    """Return the result of a method that zeroes weights, with what is to be known of it.

    Args:
        operation: What the method was given.
        config: How much was asked for.
        amount: How much that is of each matrix.
        targets: The matrices.
        pruned: What was made of them.
        record: Further facts for the manifest.
    """
    operation.progress.notice(NO_SPEED)
    by_role: dict[str, list[RoleTensor]] = defaultdict(list)
    for target in targets:
        by_role[target.role].append(target)
    prunable = sum(target.parameters for target in targets)
    total = sum(tensor.parameters for tensor in operation.structure.tensors)
    zeros = sum(pruned.zeros.values())
    facts: dict[str, object] = {
        "sparsity_of_each": amount.share,
        "pattern": config.pattern,
        "prunable_parameters": prunable,
        "all_parameters": total,
        "zeros": zeros,
        "zeros_of_prunable": zeros / prunable,
        "zeros_of_all": zeros / total,
        "zeros_by_role": {
            role: sum(pruned.zeros[target.stored] for target in members) / sum(t.parameters for t in members)
            for role, members in by_role.items()
        },
        **record,
    }
    shares = {target.stored: pruned.zeros[target.stored] / target.parameters for target in targets}
    beside = {RECORD: (json.dumps({**facts, "zeros_by_matrix": shares}, indent=2) + "\n").encode()}
    group = amount.group

    def check(model: Any) -> None:
        if group is not None:
            require_pattern(model, targets, group)

    return MethodResult(pruned.edits, facts, beside=beside, check=check)


def require_pattern(model: Any, targets: Sequence[RoleTensor], group: tuple[int, int]) -> None:
    """Check that a reloaded result has its pattern.

    Raises:
        SurgeryError: A group has more entries that are not zero: a bug.
    """
    from llmsurgery.compute.view import weight_view
    from llmsurgery.errors import SurgeryError

    n, m = group
    for target in targets:
        values = _oriented(weight_view(model, target), target)
        if bool(((values.reshape(-1, m) != 0).sum(1) > m - n).any()):
            raise SurgeryError(f"{target.stored} has groups of {m} with more than {m - n} entries that are not zero")
