"""Find the family of a checkpoint from its config and tensor names, and the role of every stored tensor."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Protocol

from llmsurgery.arch import families
from llmsurgery.arch.spec import Family, RoleTensor, Structure
from llmsurgery.errors import DamagedError, UnsupportedError


class StoredTensor(Protocol):
    """What detection needs to know of a stored tensor."""

    @property
    def dtype(self) -> str:
        """Stored dtype code."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored shape."""


def load_families() -> list[Family]:
    """Return every family: one `FAMILY` table per module of `llmsurgery.arch.families`."""
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    return [importlib.import_module(f"{families.__name__}.{name}").FAMILY for name in names]


def find_family(config: Mapping[str, object]) -> Family:
    """Return the family of a config.

    Raises:
        UnsupportedError: No family knows this `model_type`.
    """
    model_type = config.get("model_type")
    known = load_families()
    for family in known:
        if model_type in family.model_types:
            return family
    names = [name for family in known for name in family.model_types]
    raise UnsupportedError(
        f"model_type {model_type!r} is not supported" if model_type else "config.json has no model_type",
        "no family table names the module paths of its roles: embed, attn.q / attn.k / attn.v or attn.qkv, attn.o, "
        f"mlp.up, mlp.down, norms, lm_head (supported: {', '.join(sorted(names))})",
        "add one file to llmsurgery/arch/families with that table",
    )


def detect(config: Mapping[str, object], tensors: Mapping[str, StoredTensor]) -> Structure:
    """Return the structure of a checkpoint from its headers alone.

    Args:
        config: Parsed config.json.
        tensors: Stored name -> header entry.

    Raises:
        UnsupportedError: Unknown architecture, or tensor names that do not belong to it.
        DamagedError: A required tensor is missing.
    """
    family = find_family(config)
    layers = config.get(family.layers_key)
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise DamagedError(
            f"config.json has no usable {family.layers_key}",
            f"found {layers!r}, a number of blocks of 1 or more is needed",
            "restore config.json from the model's source",
        )
    memory_prefix, disk_prefix = _stored_prefix(family, tensors)
    result: list[RoleTensor] = []
    missing: list[str] = []
    tied = dict(family.tied) if config.get("tie_word_embeddings", family.tied_by_default) else {}
    for role, pattern in family.roles.items():
        for layer in range(layers) if "{layer}" in pattern else [None]:
            module = pattern.format(layer=layer)
            stem = disk_prefix + module.removeprefix(memory_prefix) if module.startswith(memory_prefix) else module
            found = False
            for part in ("weight", "bias"):
                stored = f"{stem}.{part}"
                if stored in tensors:
                    entry = tensors[stored]
                    transposed = role in family.transposed and len(entry.shape) == 2
                    result.append(RoleTensor(role, layer, part, module, stored, entry.shape, entry.dtype, transposed))
                    found = found or part == "weight"
            if not found and role not in tied and role not in family.optional:
                missing.append(f"{stem}.weight")
    if missing:
        raise DamagedError(
            f"{len(missing)} tensors are missing, first {missing[0]}",
            f"config.json announces a {family.name} model of {layers} layers that needs them",
            "download or copy the checkpoint again",
        )
    with_role = {tensor.stored for tensor in result}
    # A checkpoint may store the tied copy as well; then both names have a role and nothing is shared on disk.
    shared = {role: target for role, target in tied.items() if all(tensor.role != role for tensor in result)}
    copies = tuple((role, target) for role, target in tied.items() if role not in shared)
    other = tuple(name for name in tensors if name not in with_role and not name.endswith(family.buffers))
    return Structure(family, layers, tuple(result), shared, other, copies)


def _stored_prefix(family: Family, tensors: Mapping[str, StoredTensor]) -> tuple[str, str]:
    embed = family.roles["embed"]
    for memory, disk in family.stored_prefixes:
        if f"{disk}{embed.removeprefix(memory)}.weight" in tensors:
            return memory, disk
    example = next(iter(tensors), "(no tensors)")
    raise UnsupportedError(
        f"the tensor names do not belong to a {family.name} model: {embed}.weight is missing",
        f"first stored name: {example}",
        "check that config.json and the weights are from the same model",
    )
