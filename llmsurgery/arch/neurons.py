"""The tensors around the neurons of an MLP: what makes their pre-activations, and what reads their activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmsurgery.arch.spec import RoleTensor, Structure
from llmsurgery.errors import UnsupportedError

DENSE_GATES = ("mlp.gate", "mlp.gate_up", "shared.gate")
DENSE_KEYS = ("mlp.down", "shared.down")
SIDES = {
    "in": ("mlp.up", "mlp.gate_up", "shared.up", "expert.up"),
    "gate": ("mlp.gate", "mlp.gate_up", "shared.gate", "expert.gate"),
    "out": ("mlp.down", "shared.down", "expert.down"),
}
"""Sides of a neuron -> the roles that hold its vectors."""


def gate_tensors(
    structure: Structure, layers: tuple[int, ...] = (), experts: tuple[int, ...] = (), dense: bool = False
) -> list[RoleTensor]:
    """Return the matrices whose outputs go into the activation function.

    Args:
        structure: The checkpoint's roles.
        layers: Block numbers; empty: all.
        experts: Numbers of routed experts; empty: all.
        dense: Leave routed experts out.

    Raises:
        UnsupportedError: `dense`, and all MLPs are routed experts.
    """
    roles = [role for role in DENSE_GATES if role in structure.roles]
    # Without a gate the first matrix feeds the activation itself.
    if not {"mlp.gate", "mlp.gate_up"} & set(roles) and "mlp.up" in structure.roles:
        roles.append("mlp.up")
    if "expert.gate" in structure.roles and not dense:
        roles.append("expert.gate")
    if not roles:
        raise _only_experts()
    return structure.select(roles, layers or None, experts or None)


def key_tensors(structure: Structure, layers: tuple[int, ...] = ()) -> list[RoleTensor]:
    """Return the matrices whose inputs are the keys of a dense or shared MLP.

    Raises:
        UnsupportedError: All MLPs are routed experts.
    """
    roles = [role for role in DENSE_KEYS if role in structure.roles]
    if not roles:
        raise _only_experts()
    return structure.select(roles, layers or None)


def _only_experts() -> UnsupportedError:
    return UnsupportedError(
        "the model has no dense MLP",
        "all its MLPs are routed experts, and no layer sees the neurons of every token",
        "use another method or form",
    )


def neuron_count(gate: RoleTensor) -> int:
    """Return the number of neurons of a tensor of `gate_tensors`."""
    rows = gate.shape[1] if gate.transposed else gate.shape[0]
    # Rows of the gate, then rows of `up`.
    return rows // 2 if gate.role == "mlp.gate_up" else rows


@dataclass(frozen=True)
class NeuronVectors:
    """The vectors of one side of the neurons of one MLP, as they lie in a stored matrix.

    Attributes:
        side: What the vectors do: "in" reads the residual stream (up), "gate" opens (gate), "out" writes (down).
        tensor: The stored matrix.
        first: Row of the matrix at which they begin.
        count: Number of neurons.
    """

    side: str
    tensor: RoleTensor
    first: int
    count: int

    @property
    def part(self) -> str:
        """Which MLP of the block: "mlp", "shared" or "expert"."""
        return self.tensor.role.partition(".")[0]

    @property
    def as_rows(self) -> bool:
        """Whether a neuron's vector is a row of the stored matrix, else it is a column."""
        return (self.side == "out") == self.tensor.transposed


def neuron_vectors(
    structure: Structure, side: str, layers: Sequence[int] | None = None, dense: bool = False
) -> list[NeuronVectors]:
    """Return where the vectors of a side are stored, in order of layer.

    Args:
        structure: The checkpoint's roles.
        side: "in", "gate" or "out".
        layers: Block numbers; None: all.
        dense: Leave routed experts out.

    Raises:
        UnsupportedError: The model's MLPs have no gate, or all of them are routed experts and `dense` is set.
    """
    roles = [role for role in SIDES[side] if role in structure.roles and not (dense and role.startswith("expert."))]
    if not roles:
        if side == "gate":
            raise UnsupportedError(
                f"the MLPs of a {structure.family.name} model have no gate",
                "each neuron has one reading and one writing vector",
                "choose the side in, out or both",
            )
        raise _only_experts()
    found = []
    for tensor in structure.select(roles, layers):
        reading = tensor.shape[1 if tensor.transposed else 0]
        count = tensor.shape[0 if tensor.transposed else 1] if side == "out" else reading
        if tensor.role == "mlp.gate_up":
            count //= 2
        # Rows of the gate, then rows of `up`, as Phi3MLP splits them.
        first = count if (tensor.role, side) == ("mlp.gate_up", "in") else 0
        found.append(NeuronVectors(side, tensor, first, count))
    return found
