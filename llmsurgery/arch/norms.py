"""The norms of a model, and what reads them: which matrices multiply what a norm puts out, and nothing else does.

A norm computes y = n(x) * g + b, with n(x) = (x - mean x) / sqrt(var x + eps) for a LayerNorm and x / sqrt(mean x^2 +
eps) for an RMSNorm, g its weight (plus 1 in some families) and b its bias, if it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmsurgery.arch.spec import RoleTensor, Structure

FINAL = "norm.final"

_OF_ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.q_a", "attn.kv_a")
_OF_MLP = (
    "mlp.gate", "mlp.up", "mlp.gate_up", "router", "router.shared", "expert.gate", "expert.up", "shared.gate",
    "shared.up",
)  # fmt: skip
READERS = {
    "norm.attn": _OF_ATTENTION,
    "norm.mlp": _OF_MLP,
    "norm.q_a": ("attn.q_b",),
    "norm.kv_a": ("attn.kv_b",),
    FINAL: ("lm_head",),
}
"""Role of a norm -> roles of the matrices that read it. Norms on heads or behind a sublayer have none."""


@dataclass(frozen=True)
class Norm:
    """One norm.

    Attributes:
        role: Its role.
        layer: Its block, None for the last norm.
        weight: Its stored weight.
        bias: Its stored bias, None without one.
    """

    role: str
    layer: int | None
    weight: RoleTensor
    bias: RoleTensor | None = None

    @property
    def name(self) -> str:
        """Name for reports: "norm.mlp 3"."""
        return self.role if self.layer is None else f"{self.role} {self.layer}"


@dataclass(frozen=True)
class Reader:
    """A matrix that reads a norm, with its bias if it has one."""

    weight: RoleTensor
    bias: RoleTensor | None = None


def norms_of(structure: Structure) -> list[Norm]:
    """Return every norm of a model, block by block and the last one at the end."""
    biases = _biases(structure)
    found = [
        Norm(tensor.role, tensor.layer, tensor, biases.get(tensor.module))
        for tensor in structure.tensors
        if tensor.role.startswith("norm.") and tensor.part == "weight"
    ]
    return sorted(found, key=lambda norm: (norm.layer is None, norm.layer or 0))


def readers_of(structure: Structure, norm: Norm) -> list[Reader]:
    """Return the matrices that read a norm; none where something else reads it too, or shares their tensor.

    The head reads the last norm, but where it is tied its tensor is the embedding as well.
    """
    roles = READERS.get(norm.role, ())
    if norm.role == FINAL and ("lm_head" in structure.tied or structure.copies):
        return []
    biases = _biases(structure)
    return [
        Reader(tensor, biases.get(tensor.module) if tensor.expert is None else None)
        for tensor in structure.tensors
        if tensor.role in roles and tensor.layer == norm.layer and tensor.part == "weight"
    ]


def _biases(structure: Structure) -> dict[str, RoleTensor]:
    return {tensor.module: tensor for tensor in structure.tensors if tensor.part == "bias"}


def value_rows(structure: Structure, config: Mapping[str, object], outputs: int) -> Sequence[int]:
    """Return which outputs of a fused `attn.qkv` are values.

    Args:
        structure: The roles.
        config: The config, with what the file leaves to defaults.
        outputs: Number of outputs of the matrix.
    """

    def number(*keys: str) -> int | None:
        values = (config.get(key) for key in keys)
        return next((value for value in values if isinstance(value, int)), None)

    heads = number("num_attention_heads", "n_head")
    assert heads is not None
    if structure.family.qkv_by_head:
        size = outputs // (3 * heads)
        return [row for row in range(outputs) if row // size % 3 == 2]
    groups = number("num_key_value_heads") or heads
    size = outputs // (heads + 2 * groups)
    return range(outputs - groups * size, outputs)
