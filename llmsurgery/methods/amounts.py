"""How much `prune` zeroes and where, and the options that say so. No heavy import."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.errors import NoEffectError, UsageError
from llmsurgery.methods.registry import all_methods, find_method
from llmsurgery.methods.settings import settings_of
from llmsurgery.train.config import option

if TYPE_CHECKING:
    from llmsurgery.arch.spec import RoleTensor, Structure

PRUNABLE = "prunable"
EXPERTS = ("expert.gate", "expert.up", "expert.down")
DEFAULT_SPARSITY = 0.5


OPTIONS = {
    "sparsity": "--sparsity",
    "pattern": "--pattern",
    "of": "--of",
    "hidden": "--hidden",
    "keep_layers": "--layers",
    "teacher": "--teacher",
}
"""Hyperparameter -> the option that sets it."""


@dataclass(frozen=True)
class AmountConfig:
    """How many weights are zeroed, and where."""

    sparsity: float | None = option(None, "share of the weights that is zeroed, above 0 and below 1; none: 0.5")
    of: str = option(
        "prunable", "what that is a share of: the matrices that are pruned, or all parameters", ("prunable", "all")
    )
    pattern: str | None = option(None, "N:M, such as 2:4: zero N of every M consecutive inputs, in place of a share")
    roles: tuple[str, ...] = option(
        (PRUNABLE,),
        "roles that are pruned; `prunable`: every matrix of a block, routed experts included and routers not",
    )
    layers: tuple[int, ...] = option((), "layers that are pruned; empty: all")


@dataclass(frozen=True)
class Amount:
    """How much of each matrix is zeroed.

    Attributes:
        share: Share of the entries.
        group: (n, m): n of every m consecutive inputs of a row; None for a share alone.
    """

    share: float
    group: tuple[int, int] | None = None


def pruned_tensors(config: AmountConfig, structure: Structure) -> list[RoleTensor]:
    """Return the matrices that are pruned, in order of layer.

    Raises:
        UsageError: An unknown role, or a layer that does not exist.
        NoEffectError: The model has no such matrix there.
    """
    roles: list[str] = []
    for role in config.roles:
        if role == PRUNABLE:
            present = [name for name in EXPERTS if name in structure.roles]
            roles += ["linear", *present]
        else:
            roles.append(role)
    found = structure.select(roles, config.layers or None)
    matrices = [tensor for tensor in found if tensor.layer is not None and len(tensor.shape) == 2]
    if not matrices:
        raise NoEffectError(
            f"nothing of the roles {', '.join(config.roles)} is a matrix of a block",
            "embeddings, norms and the head are not pruned",
            f"choose among {', '.join(structure.roles)}",
        )
    return matrices


def amount_of(config: AmountConfig, structure: Structure, targets: Sequence[RoleTensor]) -> Amount:
    """Return how much of each matrix is zeroed.

    Raises:
        UsageError: The share is not between 0 and 1, the pattern is none or does not divide the width of a matrix, or
            both are given.
    """
    if config.pattern is not None:
        if config.sparsity is not None:
            raise UsageError(
                "--sparsity and --pattern are given", "a pattern has its own share of zeros", "give one of them"
            )
        return _pattern(config.pattern, targets)
    share = DEFAULT_SPARSITY if config.sparsity is None else config.sparsity
    if not 0 < share < 1:
        raise UsageError(
            f"a sparsity of {share:g} is out of bounds",
            "it is the share of the weights that is zeroed, above 0 and below 1",
            "--sparsity 0.5 zeroes half of them",
        )
    if config.of == "prunable":
        return Amount(share)
    total = sum(tensor.parameters for tensor in structure.tensors)
    prunable = sum(target.parameters for target in targets)
    if share * total >= prunable:
        raise UsageError(
            f"{share:g} of all parameters cannot be zeroed",
            f"the matrices that are pruned hold {prunable / total:.3f} of them",
            "lower --sparsity, or give it as a share of these matrices (--of prunable)",
        )
    return Amount(share * total / prunable)


def _pattern(text: str, targets: Sequence[RoleTensor]) -> Amount:
    from llmsurgery.compute.inputs import input_width

    match = re.fullmatch(r"(\d+):(\d+)", text)
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < n < m:
        raise UsageError(
            f"{text!r} is no pattern", "N:M zeroes N of every M consecutive inputs, 0 < N < M", "--pattern 2:4"
        )
    for target in targets:
        if (width := input_width(target)) % m:
            raise UsageError(
                f"pattern {text} does not fit {target.stored}",
                f"its {width} inputs are no multiple of {m}",
                f"choose an M that divides {width}, leave the role out (--set roles=...), or give --sparsity",
            )
    return Amount(n / m, (n, m))


def amount_settings(method: str, **given: object) -> dict[str, object]:
    """Return the options that were given as hyperparameters of a method.

    Args:
        method: Its name.
        **given: Hyperparameter -> value, None where the option was not given.

    Raises:
        UsageError: The method has no such hyperparameter.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    known = settings_of(find_method(method, "prune").config_type)
    for name in chosen:
        if name not in known:
            others = [
                other.spec.name
                for other in all_methods()
                if other.spec.task == "prune" and name in settings_of(other.config_type)
            ]
            raise UsageError(
                f"{method} has no {OPTIONS[name]}",
                f"methods that have it: {', '.join(others) or 'none'}",
                f"drop {OPTIONS[name]}, or choose another method",
            )
    return chosen
