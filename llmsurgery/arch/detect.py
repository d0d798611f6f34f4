"""Find the family of a checkpoint from its config and tensor names, and the role of every stored tensor."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from llmsurgery.arch import families
from llmsurgery.arch.bundle import is_bundle
from llmsurgery.arch.spec import Family, RoleTensor, Structure
from llmsurgery.errors import DamagedError, UnsupportedError

Missing = tuple[int | None, str, str]
"""Layer, role and stored name of a weight that is not there."""


class StoredTensor(Protocol):
    """What detection needs to know of a stored tensor."""

    @property
    def dtype(self) -> str:
        """Stored dtype code."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored shape."""


_MAX_EXPERTS = 500_000
"""Experts of all blocks together: twenty times those of the largest published model."""

_ANY_LAYERS = 1000
"""Blocks up to which tensors are looked for whatever is stored, so that the message can name those that are missing."""


def load_families() -> list[Family]:
    """Return every family: one `FAMILY` table per module of `llmsurgery.arch.families`."""
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    return [importlib.import_module(f"{families.__name__}.{name}").FAMILY for name in names]


def find_family(config: Mapping[str, object]) -> Family:
    """Return the family of a config.

    Raises:
        UnsupportedError: No family knows this `model_type`.
    """
    if is_bundle(config):
        raise UnsupportedError(
            "the checkpoint is a bundle",
            "its own model code does more than its weights, and an edit of these has no clear meaning",
            "edit the model that the bundle was made from",
        )
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
    language = inner_config(family, config)
    layers = _stored_layers(family, language, tensors) or _count(language, (family.layers_key,), "blocks")
    experts = _count(config, family.experts_keys, "experts") if family.experts_keys else 0
    _refuse_counts(layers, experts, len(tensors))
    prefix = _stored_prefix(family, tensors)
    found, missing = _match(family, layers, experts, prefix, tensors)
    ties = any(part.get("tie_word_embeddings", family.tied_by_default) for part in (config, language))
    tied = dict(family.tied) if ties else {}
    optional = family.optional | tied.keys()
    if absent := [name for role, name in _needed(family, found, missing) if role not in optional]:
        _refuse_fused(family, tensors)
        raise DamagedError(
            f"{len(absent)} tensors are missing, first {absent[0]}",
            f"config.json announces a {family.name} model of {layers} layers that needs them",
            "download or copy the checkpoint again",
        )
    with_role = {tensor.stored for tensor in found}
    # A checkpoint may store the tied copy as well; then both names have a role and nothing is shared on disk.
    shared = {role: target for role, target in tied.items() if all(tensor.role != role for tensor in found)}
    copies = tuple((role, target) for role, target in tied.items() if role not in shared)
    other = tuple(name for name in tensors if name not in with_role and not name.endswith(family.buffers))
    heads = config.get("num_attention_heads", config.get("n_head"))
    return Structure(
        family, layers, tuple(found), shared, other, copies, experts, heads if isinstance(heads, int) else 0
    )


def inner_config(family: Family, config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the config of the language model: a part of config.json where it is one among several networks.

    Raises:
        UnsupportedError: The language model inside is of another kind than the family's names are for.
        DamagedError: There is none.
    """
    if not family.inner_key:
        return config
    inner = config.get(family.inner_key)
    if not isinstance(inner, Mapping):
        raise DamagedError(
            f"config.json has no {family.inner_key}",
            "it says what the language model inside is",
            "restore config.json from the model's source",
        )
    # What a published config.json leaves out is Llama's.
    kind = inner.get("model_type", family.inner_types[0])
    if kind not in family.inner_types:
        raise UnsupportedError(
            f"a {family.name} model with a language model of the kind {kind!r} is not supported",
            f"the names of its tensors are known for {', '.join(family.inner_types)}",
            "",
        )
    return inner


def _stored_layers(family: Family, language: Mapping[str, object], tensors: Mapping[str, StoredTensor]) -> int:
    """Return the number of blocks by the stored names, where an inner config leaves it to a default; else 0."""
    if not family.inner_key or family.layers_key in language:
        return 0
    memory, disk = family.stored_prefixes[0]
    start = disk + family.roles["norm.attn"].partition("{layer}")[0].removeprefix(memory)
    numbers = {name.removeprefix(start).partition(".")[0] for name in tensors if name.startswith(start)}
    return len(numbers)


def _count(config: Mapping[str, object], keys: Sequence[str], of: str) -> int:
    value = next((config[key] for key in keys if config.get(key) is not None), None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DamagedError(
            f"config.json has no usable {' or '.join(keys)}",
            f"found {value!r:.80}, a number of {of} of 1 or more is needed",
            "restore config.json from the model's source",
        )
    return value


def _refuse_counts(layers: int, experts: int, stored: int) -> None:
    """Refuse numbers that no stored tensors can fill, before anything is looked up that many times.

    Raises:
        DamagedError: Very many blocks, and more of them than tensors; or more experts than any model has.
    """
    if layers > max(stored, _ANY_LAYERS) or layers * experts > _MAX_EXPERTS:
        raise DamagedError(
            f"config.json announces {layers} blocks" + (f" of {experts} experts" if experts else ""),
            f"only {stored} tensors are stored",
            "restore config.json from the model's source",
        )


def _match(
    family: Family, layers: int, experts: int, prefix: tuple[str, str], tensors: Mapping[str, StoredTensor]
) -> tuple[list[RoleTensor], list[Missing]]:
    """Go through the table; return the stored tensors with a role, and the weights that are not there."""
    memory_prefix, disk_prefix = prefix
    found: list[RoleTensor] = []
    missing: list[Missing] = []
    for role, pattern in family.roles.items():
        stored_pattern = family.stored.get(role, pattern)
        places = [
            (layer, expert)
            for layer in (range(layers) if "{layer}" in pattern else [None])
            for expert in (range(experts) if "{expert}" in stored_pattern else [None])
        ]
        for layer, expert in places:
            module = pattern.format(layer=layer)
            stem = stored_pattern.format(layer=layer, expert=expert)
            if stem.startswith(memory_prefix):
                stem = disk_prefix + stem.removeprefix(memory_prefix)
            for part in ("weight", "bias", *family.state.get(role, ())):
                name = f"{stem}.{part}"
                if name in tensors:
                    shape, dtype = tensors[name].shape, tensors[name].dtype
                    transposed = role in family.transposed and len(shape) == 2
                    fused = family.fused.get(role)
                    found.append(RoleTensor(role, layer, part, module, name, shape, dtype, transposed, expert, fused))
                elif part == "weight":
                    missing.append((layer, role, name))
    return found, missing


def _needed(family: Family, found: Sequence[RoleTensor], missing: Sequence[Missing]) -> list[tuple[str, str]]:
    """Drop what a block lacks because it has another choice of roles; return role and name of the rest."""
    present = Counter((tensor.layer, tensor.role) for tensor in found if tensor.part == "weight")
    result = []
    for layer, role, name in missing:
        groups = next((groups for groups in family.choices if any(role in group for group in groups)), ((role,),))
        # The choice a block has made is the one that most of its tensors belong to.
        chosen = max(groups, key=lambda group: sum(present[layer, member] for member in group))
        if role in chosen:
            result.append((role, name))
    return result


def _refuse_fused(family: Family, tensors: Mapping[str, StoredTensor]) -> None:
    ends = {f".{fused.parameter}" for fused in family.fused.values()}
    if fused_names := [name for name in tensors if any(name.endswith(end) for end in ends)]:
        raise UnsupportedError(
            f"the experts of a block are stored as one tensor, first {fused_names[0]}",
            f"{family.name} checkpoints hold one tensor per expert, and edits go by these names",
            "load the model with transformers and save it again: save_pretrained without save_original_format=False",
        )


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
