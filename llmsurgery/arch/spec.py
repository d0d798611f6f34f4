"""Roles: the words methods use for tensors, and how a family names them in memory and on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llmsurgery.errors import NoEffectError, UsageError, unknown_name

LINEAR_ROLES = ("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
"""The matrices of a block that LoRA and most edits aim at; a family has some of them."""


@dataclass(frozen=True)
class Family:
    """One architecture as a table.

    Attributes:
        name: Family name, also its file's name.
        model_types: Values of `model_type` in config.json that belong to it.
        layers_key: Key of config.json that holds the number of blocks.
        roles: Role -> module path in transformers; `{layer}` stands for the block's number.
        stored_prefixes: (prefix in memory, prefix on disk) pairs to try, first match wins; checkpoints of one family
            differ in the outer prefix.
        transposed: Roles whose matrix is stored [inputs, outputs].
        optional: Roles that a checkpoint may lack.
        tied: (role, role it shares its tensor with) when the config ties them.
        tied_by_default: Whether a config without `tie_word_embeddings` ties them.
        buffers: Endings of stored names that are constants of the code; stock transformers ignores them.
    """

    name: str
    model_types: tuple[str, ...]
    layers_key: str
    roles: dict[str, str]
    stored_prefixes: tuple[tuple[str, str], ...] = (("", ""),)
    transposed: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    tied: tuple[tuple[str, str], ...] = (("lm_head", "embed"),)
    tied_by_default: bool = False
    buffers: tuple[str, ...] = ()


@dataclass(frozen=True)
class RoleTensor:
    """One stored tensor and what it is.

    Attributes:
        role: Role name, for example "mlp.down".
        layer: Block number, or None outside the blocks.
        part: "weight" or "bias".
        module: Module path in transformers.
        stored: Name on disk.
        shape: Stored shape.
        dtype: Stored dtype code.
        transposed: True if a matrix is stored [inputs, outputs].
    """

    role: str
    layer: int | None
    part: str
    module: str
    stored: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool

    @property
    def label(self) -> str:
        """Role for reports: biases are told apart from weights."""
        return self.role if self.part == "weight" else f"{self.role}.{self.part}"

    @property
    def parameters(self) -> int:
        """Number of entries."""
        product = 1
        for side in self.shape:
            product *= side
        return product


@dataclass(frozen=True)
class Structure:
    """A checkpoint seen through its family's table.

    Attributes:
        family: The family.
        layers: Number of blocks.
        tensors: Every stored tensor that has a role, in table order.
        tied: Role -> role whose stored tensor it shares, as found in this checkpoint.
        other: Stored names without a role.
        copies: Pairs of roles that the config ties and that the checkpoint stores both; they move together.
    """

    family: Family
    layers: int
    tensors: tuple[RoleTensor, ...]
    tied: dict[str, str] = field(default_factory=dict)
    other: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()

    @property
    def roles(self) -> list[str]:
        """The roles that have a weight here, in table order."""
        return list(dict.fromkeys(tensor.role for tensor in self.tensors if tensor.part == "weight"))

    def role_of(self, stored: str) -> str:
        """Return the report label of a stored name, "other" if it has no role."""
        for tensor in self.tensors:
            if tensor.stored == stored:
                return tensor.label
        return "other"

    def select(self, roles: Sequence[str], layers: Iterable[int] | None = None) -> list[RoleTensor]:
        """Return the weights of some roles, in order of layer.

        Args:
            roles: Role names; `linear` stands for every matrix of a block, `all` for every weight.
            layers: Block numbers, or None for all.

        Raises:
            UsageError: An unknown role or a layer that does not exist.
            NoEffectError: The roles exist but not in these layers.
        """
        wanted = self._expand(roles)
        numbers = None if layers is None else set(layers)
        if numbers is not None and (outside := sorted(n for n in numbers if not 0 <= n < self.layers)):
            raise UsageError(
                f"layer {outside[0]} does not exist", f"the model has layers 0 to {self.layers - 1}", "change `layers`"
            )
        found = [
            tensor
            for tensor in self.tensors
            if tensor.role in wanted
            and (tensor.part == "weight" or "all" in roles)
            and (numbers is None or tensor.layer in numbers)
        ]
        if not found:
            raise NoEffectError(
                f"no tensor has role {', '.join(roles)} in the chosen layers",
                f"this model has the roles {', '.join(self.roles)}",
                "choose other roles or layers",
            )
        return sorted(found, key=lambda tensor: (tensor.layer is None, tensor.layer or 0))

    def _expand(self, roles: Sequence[str]) -> set[str]:
        wanted: set[str] = set()
        for role in roles:
            if role == "all":
                wanted.update(self.roles)
            elif role == "linear":
                wanted.update(name for name in self.roles if name in LINEAR_ROLES)
            elif role in self.tied:
                # A tied tensor is edited once, under the name it is stored under.
                wanted.add(self.tied[role])
            elif role in self.roles:
                wanted.add(role)
            else:
                raise unknown_name("role", role, [*self.roles, "linear", "all"])
        for pair in self.copies:
            # Two stored copies of one tied tensor must stay equal, or the model is no longer tied when loaded.
            if wanted & set(pair):
                wanted.update(pair)
        return wanted
