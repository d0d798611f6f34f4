"""interpolate: go part of the way back from the fine-tuned model to the aligned one, in every weight.

Paper: merges of aligned and fine-tuned checkpoints, for example arXiv 2412.19512. With a the aligned and b the
fine-tuned model:

    result = a + keep (b - a)

keep=1 is the fine-tuned model, 0 the aligned one. With keep=none shares of .9, .8, ... .1 are tried on --harmful and
--task: of those that lose no more of the task score than `drop` the one that refuses most, and of equal ones the
largest. Without that data it is .5. Every method of this task is compared with this one at the same distance from the
fine-tuned model: what it cannot beat, a single number could do as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.recovering import (
    comparable,
    computed_edits,
    controls,
    interpolated,
    interpolated_values,
    last_held,
    moved_tensors,
    set_live,
    stored_only,
    task_floor,
)
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row

TRIED = tuple(tenth / 10 for tenth in range(9, 0, -1))
HALF = 0.5


@dataclass(frozen=True)
class InterpolateConfig:
    """Hyperparameters of interpolate; `llmsurgery methods interpolate` prints them with their help."""

    keep: float | None = option(None, "share of the fine-tuning that is kept; none: tried", minimum=0, maximum=1)
    roles: tuple[str, ...] = option(("all",), "roles that move; as for training")
    layers: tuple[int, ...] = option((), "layers that move; empty: all, and what lies outside of layers")
    drop: float = option(0.05, "share of the task score that may be lost where keep is tried", minimum=0, maximum=1)
    scorer: str = option("probability", "score of the task", ("probability", "exact", "rouge_l"))
    controls: bool = option(True, "measure a random restoration and an interpolation of the same size")


@register
class Interpolate:
    """interpolate as a method of the toolkit."""

    spec = MethodSpec(
        name="interpolate",
        task="recover-alignment",
        summary="mix the fine-tuned weights with the aligned ones, one share for all",
        paper="Editing Models with Task Arithmetic, arXiv 2212.04089; merges for safety, arXiv 2412.19512",
        needs=(),
        uses=("harmful", "task"),
        export="plain",
        trained=False,
        selects=True,
        models=("aligned",),
        demo="refuse",
    )
    config_type = InterpolateConfig

    def plan(self, config: InterpolateConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the tensors that may move."""
        return structure.select(config.roles, config.layers or None)

    def prepare(self, config: InterpolateConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No data of its own."""

    def edit(self, config: InterpolateConfig, operation: Operation, prepared: None) -> MethodResult:
        """Find the share, and return the mixed weights."""
        names = {target.stored for target in self.plan(config, operation.structure)}
        tried: list[dict[str, object]] = []
        keep = config.keep
        if keep is None:
            keep, tried = _try(config, operation, names)
        stored = stored_only(operation)
        values = last_held(lambda target: interpolated_values(stored, target, keep))
        targets = [target for target in comparable(operation) if target.stored in names]
        changed, removed, entries = moved_tensors(operation, targets, values)
        record: dict[str, object] = {"keep": keep, "tried": tried}
        record["controls"] = controls(operation, changed, removed, entries, config.controls, dense=True)
        return MethodResult(computed_edits(changed, values), record, changed)


def _try(config: InterpolateConfig, operation: Operation, names: set[str]) -> tuple[float, list[dict[str, object]]]:
    """Return the share that refuses most among those that keep the task, and what was tried."""
    recovery = operation.recovery
    if recovery is None or not recovery.prompts.harmful:
        operation.progress.notice(f"without --harmful no share can be chosen: keep={HALF}")
        return HALF, []
    _, floor = task_floor(operation, config.drop)
    tried: list[dict[str, object]] = []
    best: float | None = None
    most = -1.0
    with operation.progress.task("trying shares", len(TRIED)) as tick:
        for keep in TRIED:
            set_live(operation, (pair for pair in interpolated(operation, keep) if pair[0].stored in names))
            found = recovery.quick(operation.model)
            tried.append({"keep": keep, **found})
            holds = floor is None or found["task.score"] >= floor
            if holds and found["safety.refusal_rate"] > most:
                best, most = keep, found["safety.refusal_rate"]
            tick()
    if best is None:
        operation.progress.notice(f"every share loses more of the task than drop={config.drop}: keep={TRIED[0]}")
        return TRIED[0], tried
    return best, tried
