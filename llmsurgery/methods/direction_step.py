"""A step along the refusal direction, for a model that still has the direction and hardly uses it.

With r = mean(x | H) - mean(x | G) of the aligned model, x the residual stream after a block, a bias of that block's MLP
adds c r to x at every token of every prompt. So it moves prompts of both kinds by the same length: refusals come back,
and harmless prompts may be refused as well. c is the smallest of `LENGTHS` that brings the refusals back within the
bounds of the task and of the refusals of --harmless prompts. (arXiv 2406.11717 adds r whole, and has all refused.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.edits.kinds import Edit
    from llmsurgery.evaluate.recovery import Recovery
    from llmsurgery.methods.base import Operation

LENGTHS = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
SIMILAR = 0.8
"""Least cosine of both models' directions: the direction is there."""


def step_matrix(structure: Structure, block: int) -> RoleTensor | None:
    """Return the MLP matrix of a block that can have a bias as stored; None where the architecture has no place for it.

    Llama announces biases of its MLPs by `mlp_bias`; other models take the bias that they have.
    """
    found = [t for t in structure.tensors if t.role == "mlp.down" and t.layer == block]
    weights = [tensor for tensor in found if tensor.part == "weight"]
    biased = any(tensor.part == "bias" for tensor in found)
    return weights[0] if weights and (biased or structure.family.name == "llama") else None


@contextmanager
def stepping(model: torch.nn.Module, matrix: RoleTensor, step: torch.Tensor) -> Iterator[None]:
    """Add a vector to what a matrix writes, inside a `with` block.

    Args:
        model: The model in memory.
        matrix: The matrix.
        step: c r [width].
    """

    def hook(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + step.to(output.device, output.dtype)

    handle = model.get_submodule(matrix.module).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def find_step(
    operation: Operation,
    recovery: Recovery,
    matrix: RoleTensor,
    direction: torch.Tensor,
    lengths: Sequence[float],
    wanted: float,
    floor: float | None,
    most: float | None,
) -> tuple[float | None, list[dict[str, object]]]:
    """Return the smallest length that repairs within the bounds, None if none does, and what was tried.

    Args:
        operation: What the method is given; its model must be the fine-tuned one.
        recovery: Measures it.
        matrix: Where the step is added.
        direction: r [width].
        lengths: Values of c, ascending.
        wanted: Least refusal rate.
        floor: Least task score; None without a task.
        most: Highest refusal rate of prompts that are to be answered; None without them.
    """
    tried: list[dict[str, object]] = []
    with operation.progress.task("trying a step", len(lengths)) as tick:
        for length in lengths:
            with stepping(operation.model, matrix, length * direction):
                found = {**recovery.quick(operation.model), **recovery.overrefusals(operation.model)}
            tried.append({"length": length, **found})
            tick()
            task = floor is None or found["task.score"] >= floor
            answered = most is None or found["safety.overrefusal_rate"] <= most
            if found["safety.refusal_rate"] >= wanted and task and answered:
                return length, tried
    return None, tried


def step_edits(operation: Operation, matrix: RoleTensor, step: torch.Tensor) -> list[Edit]:
    """Return the edits that store a step as a bias.

    Args:
        operation: What the method is given.
        matrix: The matrix whose output it is added to.
        step: c r [width].
    """
    from llmsurgery.methods.mlp_biases import bias_edits

    structure = operation.structure
    assert matrix.layer is not None
    present = {(t.role, t.layer): t for t in structure.tensors if t.part == "bias"}
    key = matrix.role, matrix.layer
    values: Any = step.double().cpu().numpy()
    if key in present:
        values = operation.read(present[key].stored).astype(values.dtype) + values
    return bias_edits(structure, operation.model, {key: values})
