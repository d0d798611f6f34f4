"""Writing facts into the MLPs of a loaded model: statistics, keys, values, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmsurgery.methods.base import Operation
from llmsurgery.methods.concepts import layer_of
from llmsurgery.methods.fact_figures import answer_figures, neighbour_answers, report
from llmsurgery.methods.facts import FactConfig

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor
    from llmsurgery.compute.associative import Factors, Solve
    from llmsurgery.compute.statistics import KeyStatistics
    from llmsurgery.data.rewrites import Lookup, Rewrite
    from llmsurgery.edits.kinds import LowRank
    from llmsurgery.train.value_config import ValueConfig

BARE = 0.5
"""Weight of the bare prompt in the mean key of MEMIT: one of two kinds of context."""

LARGE = 0.5
"""||Delta|| / ||W|| from which an edit is likely to be noticed elsewhere."""

TOKENS_PER_DIMENSION = 10
"""Tokens of ordinary text per dimension of a key, from which a second moment is taken as it is."""

FEW_RIDGE, RIDGE = 1e-4, 1e-6
"""Share of the mean diagonal that is added to a second moment of fewer tokens, and of enough (rounding)."""


def find_statistics(
    operation: Operation, config: FactConfig, targets: Sequence[RoleTensor]
) -> dict[int, KeyStatistics]:
    """Return the second moments of the keys of some layers over ordinary text (--text)."""
    from llmsurgery.compute.statistics import key_statistics

    size = max(target.shape[0] if target.transposed else target.shape[1] for target in targets)
    return key_statistics(
        operation.model,
        operation.structure,
        [layer_of(target) for target in targets],
        operation.data.get("text", ()),
        operation.encoder,
        operation.statistics,
        config.tokens or TOKENS_PER_DIMENSION * size,
        operation.progress,
    )


def find_values(
    operation: Operation, config: FactConfig, search: ValueConfig, rewrites: Sequence[Rewrite], site: str, layer: int
) -> tuple[torch.Tensor, list[dict[str, object]]]:
    """Return the values that make the model say the answers, and the facts of the searches for the manifest.

    Args:
        operation: What the method is given.
        config: What is to be said.
        search: How the values are found; see `optimise_value`.
        rewrites: The facts.
        site: "mlp" or "block".
        layer: Number of the block.

    Returns:
        Values [width, facts], float64, on the CPU.
    """
    import torch

    from llmsurgery.train.target_value import ValueContext, optimise_value

    def as_context(lookup: Lookup) -> ValueContext:
        return ValueContext(lookup.ids, lookup.position, lookup.start)

    objective = "entropy" if config.target == "entropy" else "target"
    pad_id = operation.encoder.pad_id
    values: list[torch.Tensor] = []
    records: list[dict[str, object]] = []
    with operation.progress.task("looking for values", len(rewrites)) as tick:
        for rewrite in rewrites:
            contexts, kept = [as_context(context) for context in rewrite.contexts], as_context(rewrite.kept)
            value, record = optimise_value(
                operation.model, operation.structure, site, layer, contexts, search, pad_id, kept, objective
            )
            values.append(value.double().cpu())
            records.append(record)
            tick()
    return torch.stack(values, 1), records


def read_keys(
    operation: Operation, target: RoleTensor, rewrites: Sequence[Rewrite], bare: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs of a matrix at the lookup tokens, over contexts and in the bare prompt.

    Args:
        operation: What the method is given, the model as edited so far.
        target: The matrix.
        rewrites: The facts.
        bare: Weight of the bare prompt among the contexts; the others share the rest.

    Returns:
        Mean keys and keys of the bare prompts, both [inputs, facts], float64, on the CPU.
    """
    import torch

    from llmsurgery.compute.spots import Spot, read_spots

    spots = [Spot(lookup.key_ids, lookup.position) for rewrite in rewrites for lookup in rewrite.keys]
    seen = read_spots(operation.model, operation.structure, spots, operation.encoder.pad_id, [target])
    keys = seen.keys[layer_of(target)].double().cpu()
    found = torch.split(keys, [len(rewrite.keys) for rewrite in rewrites])
    means = [bare * rows[0] + (1 - bare) * rows[1:].mean(0) if len(rows) > 1 else rows[0] for rows in found]
    return torch.stack(means, 1), torch.stack([rows[0] for rows in found], 1)


def read_states(operation: Operation, block: int, rewrites: Sequence[Rewrite]) -> torch.Tensor:
    """Return the residual stream after a block at the lookup tokens of the bare prompts [width, facts], float64."""
    from llmsurgery.compute.spots import Spot, read_spots

    spots = [Spot(rewrite.keys[0].key_ids, rewrite.keys[0].position) for rewrite in rewrites]
    seen = read_spots(operation.model, operation.structure, spots, operation.encoder.pad_id, (), [block])
    return seen.states[block].double().cpu().T


def inverse_of(operation: Operation, config: FactConfig, target: RoleTensor) -> tuple[Solve, dict[str, object]]:
    """Return X -> C^-1 X for the keys of a matrix over ordinary text, and the facts of C for the manifest."""
    return solver(find_statistics(operation, config, [target])[layer_of(target)])


def solver(statistics: KeyStatistics) -> tuple[Solve, dict[str, object]]:
    """Return X -> (C + ridge * mean(diag C) I)^-1 X, and the facts of C for the manifest."""
    enough = statistics.tokens >= TOKENS_PER_DIMENSION * statistics.size
    ridge = RIDGE if enough else FEW_RIDGE

    def solve(right: torch.Tensor) -> torch.Tensor:
        return statistics.solve(right, ridge).to(right.device)

    return solve, {"tokens": statistics.tokens, "dimensions": statistics.size, "ridge": ridge}


def written_now(
    operation: Operation, target: RoleTensor, keys: torch.Tensor, earlier: Factors | None = None
) -> torch.Tensor:
    """Return what a matrix turns keys [inputs, c] into [outputs, c], without its bias, float64.

    Args:
        operation: What the method is given.
        target: The matrix.
        keys: The keys.
        earlier: Factors of what has been added to the stored matrix.
    """
    import torch

    from llmsurgery.compute.associative import apply_matrix

    now = apply_matrix(torch.from_numpy(operation.read(target.stored)), keys, target.transposed)
    return now if earlier is None else now + earlier[0] @ (earlier[1] @ keys)


def bias_of(operation: Operation, target: RoleTensor) -> torch.Tensor | float:
    """Return the bias of a matrix [outputs, 1], float64; 0 without any."""
    import torch

    for tensor in operation.structure.tensors:
        if tensor.module == target.module and tensor.part == "bias":
            return torch.from_numpy(operation.read(tensor.stored)).double()[:, None]
    return 0.0


def write_update(
    operation: Operation,
    target: RoleTensor,
    factors: Factors,
    keys: torch.Tensor,
    residuals: torch.Tensor,
    earlier: Factors | None = None,
) -> tuple[Factors, dict[str, object]]:
    """Change a matrix of the model in memory to what will be stored.

    Args:
        operation: What the method is given.
        target: The matrix.
        factors: Left and right factor of the change.
        keys: What it was made for [inputs, c].
        residuals: What was to be added there [outputs, c].
        earlier: Factors of what has been added to the stored matrix before.

    Returns:
        Factors of all that has been added, and the facts of this change for the manifest.
    """
    import numpy as np
    import torch

    from llmsurgery.compute.associative import oriented, update_norm
    from llmsurgery.compute.live import write_low_rank

    total = factors
    if earlier is not None:
        total = (torch.cat([earlier[0], factors[0]], 1), torch.cat([earlier[1], factors[1]]))
    stored = operation.read(target.stored)
    added = write_low_rank(operation.model, target, stored, *oriented(*total, target.transposed), keys)
    if earlier is not None:
        added -= earlier[0] @ (earlier[1] @ keys)
    shares = (added * residuals).sum(0) / residuals.square().sum(0).clamp(min=1e-300)
    relative = update_norm(*factors) / float(np.linalg.norm(stored))
    if relative > LARGE:
        operation.progress.notice(
            f"the change of layer {layer_of(target)} is {relative:.2g} times as long as its matrix: see what it does "
            "to ordinary text, and write less (value_clamp) or elsewhere (layers)"
        )
    return total, {"layer": layer_of(target), "strength": shares.tolist(), "relative_norm": relative}


def as_edit(target: RoleTensor, factors: Factors) -> LowRank:
    """Return the edit of a matrix."""
    from llmsurgery.compute.associative import oriented
    from llmsurgery.edits.kinds import LowRank

    u, v = oriented(*factors, target.transposed)
    return LowRank(target.stored, u.numpy(), v.numpy())


Update = Callable[["RoleTensor", "torch.Tensor", "torch.Tensor"], "tuple[Factors, dict[str, object]]"]
"""Returns the factors of one layer's update, and facts of it, from keys [inputs, c] and residuals [outputs, c]."""


def write_layers(
    operation: Operation,
    config: FactConfig,
    search: ValueConfig,
    targets: Sequence[RoleTensor],
    rewrites: Sequence[Rewrite],
    update: Update,
    batch: int = 0,
) -> tuple[list[LowRank], dict[str, object]]:
    """Write facts into several layers, each layer its share of what is left to write.

    Args:
        operation: What the method is given; its model is edited.
        config: What is written.
        search: How values are found.
        targets: The matrices, in order of layer.
        rewrites: The facts.
        update: Makes the update of a layer.
        batch: Facts at a time; 0: all.

    Returns:
        One edit per matrix, and the facts of the run for the manifest.
    """
    before = (answer_figures(operation, config), neighbour_answers(operation))
    added: dict[RoleTensor, Factors] = {}
    layers: list[dict[str, object]] = []
    values: list[object] = []
    block, step = layer_of(targets[-1]), batch or len(rewrites)
    for part in (rewrites[start : start + step] for start in range(0, len(rewrites), step)):
        wanted = None
        if config.target != "erase":
            wanted, searches = find_values(operation, config, search, part, "block", block)
            values += searches
        for number, target in enumerate(targets):
            keys, _ = read_keys(operation, target, part, BARE)
            earlier = added.get(target)
            if wanted is None:
                residuals = -config.gamma * written_now(operation, target, keys, earlier)
            else:
                residuals = (wanted - read_states(operation, block, part)) / (len(targets) - number)
            factors, facts = update(target, keys, residuals)
            added[target], record = write_update(operation, target, factors, keys, residuals, earlier)
            layers.append(record | facts)
        if wanted is not None:
            left = (wanted - read_states(operation, block, part)).norm(dim=0) / wanted.norm(dim=0)
            layers[-1]["left"] = left.tolist()
    edits = [as_edit(target, factors) for target, factors in added.items()]
    found = {"values": values} if values else {}
    return edits, {"edited": layers, **found, **report(operation, config, before)}
