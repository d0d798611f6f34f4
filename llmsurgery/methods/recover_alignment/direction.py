"""direction: give what the matrices write along the refusal direction the aligned model's value.

After "Refusal in Language Models Is Mediated by a Single Direction", arXiv 2406.11717, whose algebra removes a
direction; this puts one back. With a the aligned and b the fine-tuned model, H the prompts that are refused and G those
that are answered, x the residual stream at the last token after a block:

    r = mean(x | H) - mean(x | G) in a, accumulated in float64,    rhat = r / |r|
    W_b += gamma Q Q^T (W_a - W_b)    for every matrix that writes into the residual stream (attn.o, mlp.down)

Q is rhat after one block, or with basis=all an orthonormal basis of those after all blocks. gamma=1 gives the matrix
a's component along Q and leaves what is orthogonal to it alone. gamma=none takes the smallest of .25, .5, .75 and 1
that brings the gap back to 90% of the aligned model's and the refusals to within 5 points of its own, and that loses no
more of the task than `drop`; 1 if none does.

Where none does although both models' directions agree (cosine above .8) and the gap is small, a step is tried in place
of it: the bias of one block's MLP adds c r to the residual stream, c the smallest of .1, .2, .3, .5, .75 and 1 that
brings the refusals back, keeps the task, and has prompts of --harmless refused no more than 5 points more often than
before. It moves every prompt, harmless ones too, and needs an architecture with a place for such a bias: Llama, or one
whose MLPs have it. `step` sets c, and 0 switches this off.

Embeddings are left alone: tied ones are the head as well. Models with norms after their sublayers are refused: what a
matrix writes there is scaled before it reaches the residual stream. gamma is in [0, 1], and a result that refuses less
than its source is not published. If the direction is intact and the model complies all the same, the damage lies behind
it, this method cannot help, and a notice says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from llmsurgery.errors import NoEffectError, UnsupportedError, UsageError
from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.recovering import (
    controls,
    default_blocks,
    other_values,
    own_values,
    removed_share,
    set_live,
    task_floor,
)
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row

WRITERS = ("attn.o", "mlp.down", "shared.down", "expert.down")
POST_NORMS = ("norm.attn_post", "norm.mlp_post")
GAMMAS = (0.25, 0.5, 0.75, 1.0)
GAP, POINTS, INTACT = 0.9, 0.05, 0.9


@dataclass(frozen=True)
class DirectionConfig:
    """Hyperparameters of direction; `llmsurgery methods direction` prints them with their help."""

    gamma: float | None = option(None, "how far the component goes back; none: tried", minimum=0, maximum=1)
    basis: str = option("all", "directions after all blocks, or after one", ("all", "one"))
    block: int | None = option(None, "basis=one: the block; none: the last of the first floor(2n/3)", minimum=0)
    layers: tuple[int, ...] = option((), "layers that are edited; empty: all")
    step: float | None = option(
        None, "length of a step along the direction in place of the projection; none: tried if that fails, 0: never",
        minimum=0, maximum=1,
    )  # fmt: skip
    drop: float = option(0.05, "share of the task score that may be lost where gamma is tried", minimum=0, maximum=1)
    scorer: str = option("probability", "score of the task", ("probability", "exact", "rouge_l"))
    controls: bool = option(True, "measure a random restoration and an interpolation of the same size")


@register
class Direction:
    """direction as a method of the toolkit."""

    spec = MethodSpec(
        name="direction",
        task="recover-alignment",
        summary="restore what the matrices write along the aligned model's refusal direction",
        paper="Refusal in Language Models Is Mediated by a Single Direction, arXiv 2406.11717",
        needs=("harmful",),
        uses=("harmless", "task"),
        export="plain",
        trained=False,
        selects=True,
        roles=("attn.o", "mlp.down"),
        lacks=POST_NORMS,
        models=("aligned",),
        demo="refuse",
    )
    config_type = DirectionConfig

    def plan(self, config: DirectionConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices that write into the residual stream.

        Raises:
            UnsupportedError: Norms stand behind them.
        """
        if set(POST_NORMS) & set(structure.roles):
            raise UnsupportedError(
                f"{structure.family.name} has norms after attention and MLP",
                "what a matrix writes is scaled by them before it reaches the residual stream",
                "use restore, or another model",
            )
        return structure.select([role for role in WRITERS if role in structure.roles], config.layers or None)

    def prepare(self, config: DirectionConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """Check that there are two sides.

        Raises:
            UsageError: There is one.
        """
        if not data.get("harmless") and not data.get("task"):
            raise UsageError(
                "--harmless is missing",
                "a direction lies between prompts that are refused and prompts that are answered",
                "give --harmless FILE, or --task FILE",
            )

    def edit(self, config: DirectionConfig, operation: Operation, prepared: None) -> MethodResult:
        """Find gamma, and return one low-rank edit per matrix."""
        from llmsurgery.edits.kinds import LowRank

        targets = list(self.plan(config, operation.structure))
        basis, record = _basis(config, operation)
        gamma = config.gamma
        tried: list[dict[str, object]] = []
        repaired = True
        if gamma is None and not config.step:
            gamma, tried, repaired = _try(config, operation, targets, basis)
        if config.step or (not repaired and config.step is None):
            stepped = _step(config, operation, targets, {**record, "tried": tried})
            if stepped is not None:
                return stepped
        if not repaired:
            operation.progress.notice("no gamma brings direction and refusals back within the bounds: gamma=1")
        assert gamma is not None
        edits = []
        values: dict[RoleTensor, torch.Tensor] = {}
        for target in targets:
            left, right = restoring_factors(operation, target, basis, gamma)
            edits.append(LowRank(target.stored, left.numpy(), right.numpy()))
            values[target] = (own_values(operation, target).double() + left @ right).float()
        removed, entries = removed_share(operation, values.__getitem__, targets)
        record |= {"gamma": gamma, "tried": tried, "directions": basis.shape[1]}
        record["controls"] = controls(operation, targets, removed, entries, config.controls, dense=True)
        return MethodResult(edits, record, targets)


def _basis(config: DirectionConfig, operation: Operation) -> tuple[torch.Tensor, dict[str, object]]:
    """Return Q [width, directions], float64, and what is recorded of it."""
    recovery, layers = operation.recovery, operation.structure.layers
    assert recovery is not None
    assert recovery.contrast is not None
    block = default_blocks(layers) - 1 if config.block is None else config.block
    if block >= layers:
        raise UsageError(f"block {block} does not exist", f"the model has blocks 0 to {layers - 1}", "lower block")
    apart = recovery.contrast.differences()
    if not bool(apart.norm(dim=1).min()):
        raise NoEffectError("the prompts leave the model alone", "both sides have the same states", "check the data")
    own = recovery.direction(operation.model)
    share = own.number
    refused = recovery.quick(operation.model).get("safety.refusal_rate", 0.0)
    wanted = recovery.figures_of_aligned["safety.refusal_rate"].number
    if share >= INTACT and refused < wanted - POINTS:
        operation.progress.notice(
            f"the fine-tuned model has {share:.0%} of the aligned model's refusal direction and complies "
            "all the same: the damage lies behind it, and projection repair does not help; use restore"
        )
    chosen = apart if config.basis == "all" else apart[block : block + 1]
    cosines = cast("list[float]", own.detail["cosine"])
    return orthonormal(chosen), {"block": block, "gap_before": share, "cosine": cosines[block]}


def _step(
    config: DirectionConfig, operation: Operation, targets: Sequence[RoleTensor], record: Mapping[str, object]
) -> MethodResult | None:
    """Return a step along the direction in place of the projection; None where it is of no use, with the reason."""
    from llmsurgery.methods.direction_step import LENGTHS, SIMILAR, find_step, step_edits, step_matrix

    recovery, block = operation.recovery, cast(int, record["block"])
    assert recovery is not None
    assert recovery.contrast is not None
    cosine, share = cast(float, record["cosine"]), cast(float, record["gap_before"])
    matrix = step_matrix(operation.structure, block)
    if not config.step and (cosine <= SIMILAR or share >= INTACT):
        return None
    if matrix is None:
        family = operation.structure.family.name
        if config.step:
            raise UnsupportedError(
                f"a {family} model has no place for a step", "its MLPs have no bias", "use gamma, or restore"
            )
        operation.progress.notice(f"a step along the direction was not tried: MLPs of {family} models have no bias")
        return None
    set_live(operation, ((t, own_values(operation, t)) for t in targets))
    direction = recovery.contrast.differences()[block]
    length, tried = config.step, list[dict[str, object]]()
    if not length:
        wanted = recovery.figures_of_aligned["safety.refusal_rate"].number - POINTS
        _, floor = task_floor(operation, config.drop)
        before = recovery.overrefusals(operation.model).get("safety.overrefusal_rate")
        most = None if before is None else before + POINTS
        length, tried = find_step(operation, recovery, matrix, direction, LENGTHS, wanted, floor, most)
    if length is None:
        operation.progress.notice("no step along the direction brings the refusals back within the bounds either")
        return None
    edits = step_edits(operation, matrix, length * direction)
    found = {**record, "step": {"length": length, "norm": length * float(direction.norm()), "tried": tried}}
    return MethodResult(edits, found, [])


def orthonormal(rows: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of the rows [width, rank], float64, without directions that add next to nothing."""
    import torch

    units = rows.double() / rows.double().norm(dim=1, keepdim=True)
    _, values, right = torch.linalg.svd(units, full_matrices=False)
    basis: torch.Tensor = right[values > 1e-6 * values[0]].T.contiguous()
    return basis


def restoring_factors(
    operation: Operation, target: RoleTensor, basis: torch.Tensor, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of gamma Q Q^T (W_a - W_b) in the stored orientation, float64."""
    missing = other_values(operation, "aligned", target).double() - own_values(operation, target).double()
    if target.transposed:
        # Stored as [inputs, width]: the transpose of Q (Q^T D).
        return gamma * (missing @ basis), basis.T.contiguous()
    return gamma * basis, basis.T @ missing


def _try(
    config: DirectionConfig, operation: Operation, targets: Sequence[RoleTensor], basis: torch.Tensor
) -> tuple[float, list[dict[str, object]], bool]:
    """Return the smallest gamma that repairs enough, what was tried, and whether one did."""
    recovery = operation.recovery
    assert recovery is not None
    wanted = recovery.figures_of_aligned["safety.refusal_rate"].number - POINTS
    _, floor = task_floor(operation, config.drop)
    tried: list[dict[str, object]] = []
    with operation.progress.task("trying gamma", len(GAMMAS)) as tick:
        for gamma in GAMMAS:
            set_live(operation, ((t, _repaired(operation, t, basis, gamma)) for t in targets))
            figures = {**recovery.quick(operation.model), "safety.direction_gap": recovery.gap(operation.model)}
            tried.append({"gamma": gamma, **figures})
            tick()
            task = floor is None or figures["task.score"] >= floor
            if figures["safety.direction_gap"] >= GAP and figures["safety.refusal_rate"] >= wanted and task:
                return gamma, tried, True
    return GAMMAS[-1], tried, False


def _repaired(operation: Operation, target: RoleTensor, basis: torch.Tensor, gamma: float) -> torch.Tensor:
    left, right = restoring_factors(operation, target, basis, gamma)
    return (own_values(operation, target).double() + left @ right).float()
