"""What all methods of a task have in common, so that no method has to say it. No heavy import."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task, as runs see it.

    Attributes:
        demo_data: Data that a run on the demo is given beside what its method needs or uses.
        measures: What a run measures of itself beside the usual figures: needs of metrics, keys of
            `llmsurgery.evaluate.gates.NEEDS`.
    """

    demo_data: tuple[str, ...] = ("retain",)
    measures: tuple[str, ...] = ()


TASKS = {
    "unlearn": Task(),
    # What becomes of a name shows in questions about it.
    "redirect": Task(demo_data=("forget", "retain")),
    "recover-alignment": Task(demo_data=("harmful", "task", "harmless")),
    "prune": Task(measures=("loss", "pruning")),
    "remove-layernorm": Task(demo_data=(), measures=("loss", "norms")),
    "debias": Task(demo_data=()),
}
"""Task, as in the command -> what its methods have in common."""
