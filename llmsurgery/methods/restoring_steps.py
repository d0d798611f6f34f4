"""The search of `restore`: steps of restoring, with or without rollback, and the states that may become its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.methods.restoring import Packed, Restoration

if TYPE_CHECKING:
    import torch

    from llmsurgery.data.chat import Encoded


@dataclass(frozen=True)
class Steps:
    """How the search goes on; the fields are those of the method's config.

    Attributes:
        count: Entries per step.
        steps: Steps in all.
        warm_up: Steps before the first look at the task.
        save_every: Steps between two states that may become the result.
        rollback: Share of the candidates that go back in each step, once rollback is on.
        accumulate: Add the gradients of all steps up as long as nothing is rolled back.
        batch: Prompts per batch.
    """

    count: int
    steps: int
    warm_up: int
    save_every: int
    rollback: float
    accumulate: bool
    batch: int


@dataclass(frozen=True)
class Aims:
    """What the search looks at.

    Attributes:
        prompts: Prompts that are to be refused.
        direction: Their mean state in the aligned model.
        task_prompts: Prompts of the task; empty without a task.
        task_direction: Their mean state in the fine-tuned model.
        score: Scores the model in memory on the task; None without one.
        floor: Least score.
    """

    prompts: Sequence[Encoded]
    direction: torch.Tensor
    task_prompts: Sequence[Encoded] = ()
    task_direction: torch.Tensor | None = None
    score: Callable[[], float] | None = None
    floor: float = 0.0


@dataclass
class Found:
    """What a search found: its states by step, and what happened in each step."""

    states: dict[int, Packed]
    steps: list[dict[str, object]]
    mode: str
    warm_up_score: float | None = None


def run_steps(restoration: Restoration, aims: Aims, plan: Steps, rollback: bool, tick: Callable[..., None]) -> Found:
    """Run all steps; without rollback stop after the warm-up if the task has suffered.

    Args:
        restoration: The model, at its start.
        aims: What the search looks at.
        plan: How it goes on.
        rollback: Whether each step is followed by a rollback.
        tick: Told of every step.
    """
    found = Found({}, [], "rollback" if rollback else "plain")
    for step in range(1, plan.steps + 1):
        if rollback or not plan.accumulate:
            restoration.gradients.clear()
        loss = restoration.add_gradients(aims.prompts, aims.direction, plan.batch)
        chosen = restoration.restore(plan.count)
        entry: dict[str, object] = {"step": step, "loss": loss, "restored": sum(map(len, chosen.values()))}
        if rollback and aims.task_direction is not None and chosen:
            restoration.gradients.clear()
            restoration.add_gradients(aims.task_prompts, aims.task_direction, plan.batch)
            entry["given_back"] = restoration.roll_back(chosen, plan.rollback)
        found.steps.append(entry)
        tick()
        if step == plan.warm_up and not rollback and aims.score is not None:
            found.warm_up_score = aims.score()
            if found.warm_up_score < aims.floor:
                return found
        if step % plan.save_every == 0 or step == plan.steps or not chosen:
            found.states[step] = Packed.of(restoration.restored)
        if not chosen:
            break
    return found
