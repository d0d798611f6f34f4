"""Roles: the words methods use for tensors, and how a family names them in memory and on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from llmsurgery.errors import NoEffectError, UnsupportedError, UsageError, unknown_name

LINEAR_ROLES = (
    "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.q_a", "attn.q_b", "attn.kv_a", "attn.kv_b", "attn.o",
    "mlp.gate", "mlp.up", "mlp.gate_up", "mlp.down", "shared.gate", "shared.up", "shared.down",
)  # fmt: skip
"""The matrices of a block that LoRA and most edits aim at; a family has some of them. Routed experts are not among
them: in memory they are slices of one parameter, and there are many."""

GROUPS = {"linear": ("",), "mlp": ("mlp.", "shared."), "attention": ("attn.",)}
"""Words for several of `LINEAR_ROLES` at once -> how their names begin."""


@dataclass(frozen=True)
class Fused:
    """Where transformers keep the matrices of one role in memory: all experts of a block in one 3-D parameter.

    The matrix of expert e is block number `block` of `blocks` equal blocks of rows of `parameter[e]`.

    Attributes:
        parameter: Name of the parameter [experts, rows, columns].
        block: Number of the block of rows.
        blocks: Number of blocks.
    """

    parameter: str
    block: int = 0
    blocks: int = 1


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
        stored: Role -> module path as stored, with the prefix of the tree in memory, where it is not that of `roles`;
            `{expert}` stands for the expert's number.
        fused: Roles of experts -> where their matrices lie in memory; `roles` then names the module of all experts.
        experts_keys: Keys of config.json that may hold the number of routed experts; none if there are no experts.
        choices: Sets of roles of which each block has one: routed experts or a dense MLP.
        state: Role -> further stored tensors of its module, which are no parameters and do not train.
        norm_offset: What the norms add to their weight before they multiply.
        norm_centres: Whether the norms take off the mean first (LayerNorm); the others are RMSNorms.
        norm_eps: Key of config.json that holds what the norms add to the variance.
        qkv_by_head: Whether `attn.qkv` has q, k and v of head 0 first, then those of head 1.
        router_scores: How routers turn logits into scores: "softmax", or "sigmoid" of each by itself.
        inner_key: Key of config.json that holds the config of the language model inside; empty if config.json does.
        inner_types: Values of its `model_type` that have these names.
        scaled_embedding: Whether what the embedding gives is multiplied by the root of the width.
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
    stored: dict[str, str] = field(default_factory=dict)
    fused: dict[str, Fused] = field(default_factory=dict)
    experts_keys: tuple[str, ...] = ()
    choices: tuple[tuple[tuple[str, ...], ...], ...] = ()
    state: dict[str, tuple[str, ...]] = field(default_factory=dict)
    norm_offset: float = 0.0
    norm_centres: bool = False
    norm_eps: str = "rms_norm_eps"
    qkv_by_head: bool = False
    router_scores: str = "softmax"
    inner_key: str = ""
    inner_types: tuple[str, ...] = ()
    scaled_embedding: bool = False


@dataclass(frozen=True)
class RoleTensor:
    """One stored tensor and what it is.

    Attributes:
        role: Role name, for example "mlp.down".
        layer: Block number, or None outside the blocks.
        part: "weight", "bias", or the name of a further tensor of the module.
        module: Module path in transformers.
        stored: Name on disk.
        shape: Stored shape.
        dtype: Stored dtype code.
        transposed: True if a matrix is stored [inputs, outputs].
        expert: Number of the routed expert, or None.
        fused: Where in the module's parameters the tensor lies, or None if it is the parameter `part`.
    """

    role: str
    layer: int | None
    part: str
    module: str
    stored: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool
    expert: int | None = None
    fused: Fused | None = None

    @property
    def label(self) -> str:
        """Role for reports: biases and the like are told apart from weights."""
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
        experts: Number of routed experts of a block, 0 without any.
        heads: Number of query heads of a block, 0 if the config does not say.
    """

    family: Family
    layers: int
    tensors: tuple[RoleTensor, ...]
    tied: dict[str, str] = field(default_factory=dict)
    other: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    experts: int = 0
    heads: int = 0

    @property
    def roles(self) -> list[str]:
        """The roles that have a weight here, in table order."""
        return list(dict.fromkeys(tensor.role for tensor in self.tensors if tensor.part == "weight"))

    @cached_property
    def _labels(self) -> dict[str, str]:
        return {tensor.stored: tensor.label for tensor in self.tensors}

    def role_of(self, stored: str) -> str:
        """Return the report label of a stored name, "other" if it has no role."""
        return self._labels.get(stored, "other")

    def select(
        self, roles: Sequence[str], layers: Iterable[int] | None = None, experts: Iterable[int] | None = None
    ) -> list[RoleTensor]:
        """Return the weights of some roles, in order of layer.

        Args:
            roles: Role names; `linear` stands for every matrix of a block that is not a routed expert's, `mlp` and
                `attention` for those of them that belong to the MLP (shared experts included) or to attention, `all`
                for every weight and bias.
            layers: Block numbers, or None for all.
            experts: Numbers of routed experts, or None for all; tensors that belong to no expert are not affected.

        Raises:
            UsageError: An unknown role, or a layer or expert that does not exist.
            NoEffectError: The roles exist but not in these layers.
        """
        wanted = self._expand(roles)
        numbers = _existing("layer", layers, self.layers)
        chosen = _existing("expert", experts, self.experts)
        parts = ("weight", "bias") if "all" in roles else ("weight",)
        found = [
            tensor
            for tensor in self.tensors
            if tensor.role in wanted
            and tensor.part in parts
            and (numbers is None or tensor.layer in numbers)
            and (chosen is None or tensor.expert is None or tensor.expert in chosen)
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
            elif role in GROUPS:
                wanted.update(name for name in self.roles if name in LINEAR_ROLES and name.startswith(GROUPS[role]))
            elif role in self.tied:
                # A tied tensor is edited once, under the name it is stored under.
                wanted.add(self.tied[role])
            elif role in self.roles:
                wanted.add(role)
            else:
                raise unknown_name("role", role, [*self.roles, *GROUPS, "all"])
        for pair in self.copies:
            # Two stored copies of one tied tensor must stay equal, or the model is no longer tied when loaded.
            if wanted & set(pair):
                wanted.update(pair)
        return wanted


def require_text_model(structure: Structure, what: str) -> None:
    """Refuse a language model inside a model that sees pictures.

    Args:
        structure: The checkpoint's roles.
        what: What is refused, for the message.

    Raises:
        UnsupportedError: It is one.
    """
    if structure.family.inner_key:
        raise UnsupportedError(
            f"{what} is for text models, and this is a vision-language model ({structure.family.name})",
            "its data and figures know no pictures, and what it does to what the model sees would stay unmeasured",
            "for such models there are debias --method vlm-calibrate and vlm-contrast, eval, inspect, diff and verify",
        )


def _existing(kind: str, numbers: Iterable[int] | None, count: int) -> set[int] | None:
    """Return the numbers as a set, refusing those outside 0 to count - 1."""
    if numbers is None:
        return None
    chosen = set(numbers)
    if outside := sorted(number for number in chosen if not 0 <= number < count):
        there = f"the model has {kind}s 0 to {count - 1}" if count else f"the model has no {kind}s"
        raise UsageError(f"{kind} {outside[0]} does not exist", there, f"change `{kind}s`")
    return chosen
