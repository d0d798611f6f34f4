"""restore: put a few weights of the aligned model back, those that turn harmful prompts back to where it had them.

Paper: "Alleviating the Fear of Losing Alignment in LLM Fine-tuning", arXiv 2504.09757. No optimiser and no training
step: every entry of the result is bit for bit the aligned model's or the fine-tuned one's.

With h the residual stream after the first floor(2n/3) of n blocks at a prompt's last token, v the mean of h over the
harmful prompts in the aligned model, theta the model (at first the fine-tuned one, b), a the aligned one, N the
parameters of all blocks:

    loss = sum over batches of -cos(mean of h, v),    g = its gradient
    restore   of the entries of these blocks, norms left out, with theta != a, g != 0 and sign(theta - a) = sign(g)
              the ceil(rate N) with the largest |g|, all tensors ranked together: theta <- a
    roll back of these, by the same rule for the task's prompts and b's own mean of h, a fifth: theta <- b

After five steps the task is scored on rows that no gradient saw. If it has suffered, all starts again with a rollback
in every step. Of the states after 5, 10, 15 and 20 steps the last before the score falls below its floor is the result;
if that is none, there is no result. Without --task there is neither floor nor rollback.

What differs from the released code (kangyangWHU/LLMAlignment):

- It takes entries above the k-th value, k - 1 of them or fewer with ties, and fails where k exceeds the candidates.
  Here it is exactly min(k, candidates), ties in the order of the file.
- It zips both loaders, so that the shorter set cuts the longer. Here all prompts are used, and counted in the manifest.
- It scores with "<" after the warm-up and "<=" at the end. Here both are "<".
- It keeps dropout on. Here the model stays in eval mode.
- It finds norms by "layernorm" in their names, which misses q_norm and k_norm. Here they are known by their role.
- With rollback on several devices it reads gradients that it has just removed. Here they are read before.
- It caches directions by model, data set and size, so that a changed file or template silently reuses an old one. Here
  nothing is cached.
- It holds fp32 copies of both models and of all gradients. Here weights stay in their dtype, gradients add up in fp32,
  and both models are read tensor by tensor.

accumulate=true keeps, as released, adding gradients up over the steps as long as nothing is rolled back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.recovering import (
    block_parameters,
    controls,
    default_blocks,
    removed_share,
    restored_edits,
    searched_targets,
)
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.methods.restoring import Restoration
    from llmsurgery.methods.restoring_steps import Aims, Found, Steps


@dataclass(frozen=True)
class RestoreConfig:
    """Hyperparameters of restore; `llmsurgery methods restore` prints them with their help."""

    rate: float = option(0.002, "entries per step, as a share of the parameters of all blocks", minimum=0, maximum=1)
    steps: int = option(20, "steps", minimum=1)
    warm_up: int = option(5, "steps before the task is looked at for the first time", minimum=1)
    save_every: int = option(5, "steps between two states that may become the result", minimum=1)
    rollback: float = option(
        0.2, "share of what may go back that does, in each step with rollback", minimum=0, maximum=1
    )
    drop: float = option(0.05, "share of the task score that may be lost", minimum=0, maximum=1)
    scorer: str = option("probability", "score of the task", ("probability", "exact", "rouge_l"))
    prompts: int = option(256, "harmful prompts, and as many of the task, that gradients are taken of", minimum=1)
    score_rows: int = option(64, "rows of the task that the floor is checked on", minimum=1)
    batch: int = option(8, "prompts per batch", minimum=1)
    blocks: int | None = option(None, "blocks that are searched; none: floor(2n/3)", minimum=1)
    accumulate: bool = option(True, "add gradients up over the steps as long as nothing is rolled back")
    sign_rule: bool = option(True, "restore only what lowers the loss; false: whatever differs, by |g|")
    controls: bool = option(True, "measure a random restoration and an interpolation of the same size")


@register
class Restore:
    """restore as a method of the toolkit."""

    spec = MethodSpec(
        name="restore",
        task="recover-alignment",
        summary="put a few entries of the aligned model back, chosen along its direction of refusals",
        paper="Alleviating the Fear of Losing Alignment in LLM Fine-tuning, arXiv 2504.09757",
        needs=("harmful",),
        uses=("task",),
        export="plain",
        trained=False,
        selects=True,
        models=("aligned",),
        demo="refuse",
    )
    config_type = RestoreConfig

    def plan(self, config: RestoreConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the tensors that may be restored."""
        return searched_targets(structure, config.blocks)

    def further_bytes(self, config: RestoreConfig, structure: Structure) -> int:
        """Return what the search holds beside the weights: gradients in fp32, a mask, and a tensor of each model."""
        sizes = [target.parameters for target in searched_targets(structure, config.blocks)]
        return 5 * sum(sizes) + 16 * max(sizes)

    def prepare(self, config: RestoreConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No data of its own: the run encodes prompts and task for the figures, and the search uses the same."""

    def edit(self, config: RestoreConfig, operation: Operation, prepared: None) -> MethodResult:
        """Search, choose the state, and return its entries."""
        from llmsurgery.methods.restoring import Restoration

        structure = operation.structure
        targets = searched_targets(structure, config.blocks)
        block = (config.blocks or default_blocks(structure.layers)) - 1
        restoration = Restoration(operation, targets, block, config.sign_rule)
        aims, record = _aims(config, operation, block)
        plan = _steps(config, structure)
        found = _search(restoration, aims, plan, operation)
        chosen, scores = _choose(restoration, aims, found)
        masks = found.states[chosen].unpacked()
        edits, changed, counts = restored_edits(operation, targets, masks)
        restoration.gradients.clear()
        shown = dict(zip([target.stored for target in targets], masks, strict=True))

        def result(target: RoleTensor) -> torch.Tensor:
            own, aligned = restoration.own(target), restoration.aligned(target)
            return own.where(~shown[target.stored], aligned).reshape(target.shape)

        removed, entries = removed_share(operation, result, changed)
        record |= {
            "blocks": block + 1,
            "entries_per_step": plan.count,
            "mode": found.mode,
            "warm_up_score": found.warm_up_score,
            "chosen_step": chosen,
            "scores": scores,
            "steps": found.steps,
            "restored": counts,
            "controls": controls(operation, targets, removed, entries, config.controls),
        }
        return MethodResult(edits, record, changed)


def _steps(config: RestoreConfig, structure: Structure) -> Steps:
    from llmsurgery.methods.restoring_steps import Steps

    return Steps(
        count=math.ceil(config.rate * block_parameters(structure)),
        steps=config.steps,
        warm_up=min(config.warm_up, config.steps),
        save_every=config.save_every,
        rollback=config.rollback,
        accumulate=config.accumulate,
        batch=config.batch,
    )


def _aims(config: RestoreConfig, operation: Operation, block: int) -> tuple[Aims, dict[str, object]]:
    """Take the directions, and the task's score at the start; return what is recorded of them too."""
    from llmsurgery.evaluate.recovery import last_states
    from llmsurgery.methods.restoring_steps import Aims

    recovery, encoder = operation.recovery, operation.encoder
    assert recovery is not None
    prompts = recovery.prompts.harmful[: config.prompts]
    aligned = operation.models["aligned"].load()
    direction = _mean(last_states(aligned, operation.structure, prompts, encoder.pad_id, block))
    del aligned
    record: dict[str, object] = {"harmful_prompts": len(prompts)}
    if not recovery.prompts.task:
        operation.progress.notice("without --task nothing holds the task: no floor, and no rollback")
        return Aims(prompts, direction), record
    seen, held = _halves(recovery.prompts.task_prompts, recovery.prompts.task)
    seen, held = seen[: config.prompts], held[: config.score_rows]
    of_task = _mean(last_states(operation.model, operation.structure, seen, encoder.pad_id, block))

    def score() -> float:
        values = recovery.task_scores(operation.model, held)
        return sum(values) / len(values)

    start = score()
    floor = (1 - config.drop) * start
    record |= {"task_prompts": len(seen), "score_rows": len(held), "score_before": start, "floor": floor}
    return Aims(prompts, direction, seen, of_task, score, floor), record


def _halves(prompts: Sequence[Encoded], rows: Sequence[Encoded]) -> tuple[Sequence[Encoded], Sequence[Encoded]]:
    """Return prompts for gradients and rows for scores, the first and the second half; a single row is both."""
    half = max(1, len(rows) // 2)
    return prompts[:half], rows[half:] or rows


def _mean(states: torch.Tensor) -> torch.Tensor:
    return states.double().mean(0).float()


def _search(restoration: Restoration, aims: Aims, plan: Steps, operation: Operation) -> Found:
    """Run the steps, and once more with rollback if the task suffered in the warm-up."""
    import torch

    from llmsurgery.methods.restoring_steps import run_steps

    with restoration.searching(), operation.progress.task("restoring", plan.steps) as tick:
        found = run_steps(restoration, aims, plan, False, tick)
        if found.warm_up_score is not None and found.warm_up_score < aims.floor:
            operation.progress.notice(
                f"the task fell to {found.warm_up_score:.4g} in the warm-up, below {aims.floor:.4g}: "
                "starting again, with rollback"
            )
            warm_up = found.warm_up_score
            restoration.show([torch.zeros_like(mask) for mask in restoration.restored])
            restoration.gradients.clear()
            found = run_steps(restoration, aims, plan, True, tick)
            found.warm_up_score = warm_up
    return found


def _choose(restoration: Restoration, aims: Aims, found: Found) -> tuple[int, dict[str, float]]:
    """Return the step whose state is the result, and the scores that were taken.

    Raises:
        NoEffectError: Nothing could be restored.
        GateError: The first state already lost too much of the task.
    """
    from llmsurgery.errors import GateError, NoEffectError

    if not any(mask.any() for state in found.states.values() for mask in state.masks):
        raise NoEffectError(
            "no entry could be restored",
            "no weight of the searched blocks differs from the aligned model and would turn the prompts back",
            "check --aligned and --harmful",
        )
    scores: dict[str, float] = {}
    chosen: int | None = None
    for step, state in sorted(found.states.items()):
        if aims.score is not None:
            restoration.show(state.unpacked())
            scores[str(step)] = aims.score()
            if scores[str(step)] < aims.floor:
                break
        chosen = step
    if chosen is None:
        first = min(found.states)
        raise GateError(
            f"after {first} steps the task scores {scores[str(first)]:.4g}, below its floor of {aims.floor:.4g}",
            "every state of the search loses more of the task than may be lost",
            "lower --set rate=... or save_every=..., or raise --set drop=...",
        )
    return chosen, scores
