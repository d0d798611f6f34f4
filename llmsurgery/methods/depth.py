"""What methods that remove whole blocks share: how many, which tensors that drops and renames, and the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmsurgery.errors import UnsupportedError, UsageError
from llmsurgery.methods.base import MethodResult, Operation
from llmsurgery.train.config import option

if TYPE_CHECKING:
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.edits.kinds import Config, Edit, Json

DEFAULT_SHARE = 0.25

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Keys of config.json with one entry for each block."""

NUMBERS = ("mlp_only_layers",)
"""Keys with numbers of blocks."""

FIRST = ("first_k_dense_replace", "max_window_layers")
"""Keys that count the first blocks."""


@dataclass(frozen=True)
class DepthConfig:
    """How many blocks are removed."""

    sparsity: float | None = option(None, "share of the blocks that is removed, above 0 and below 1; none: 0.25")
    keep_layers: int | None = option(None, "blocks that are kept, in place of it; the option --layers sets it")


def removed_count(config: DepthConfig, structure: Structure) -> int:
    """Return how many blocks are removed: one at least, and one at least is kept.

    Raises:
        UsageError: The share or the number is out of bounds, or both are given.
        UnsupportedError: The model has a single block, or scales its blocks by their numbers.
    """
    layers = structure.layers
    if layers < 2:
        raise UnsupportedError("the model has one block", "none would be left", "use a method that zeroes weights")
    if config.keep_layers is not None:
        if config.sparsity is not None:
            raise UsageError("--layers and --sparsity are given", "both say how many blocks go", "give one of them")
        if not 0 < config.keep_layers < layers:
            raise UsageError(
                f"{config.keep_layers} blocks cannot be kept",
                f"the model has {layers}, and one at least is removed and one kept",
                f"--layers takes 1 to {layers - 1}",
            )
        return layers - config.keep_layers
    share = DEFAULT_SHARE if config.sparsity is None else config.sparsity
    if not 0 < share < 1:
        raise UsageError(
            f"a sparsity of {share:g} is out of bounds",
            "it is the share of the blocks that is removed, above 0 and below 1",
            "--sparsity 0.25 removes a quarter of them",
        )
    return min(layers - 1, max(1, round(share * layers)))


def block_tensors(structure: Structure) -> list[RoleTensor]:
    """Return every stored tensor of a block: what may be dropped."""
    return [tensor for tensor in structure.tensors if tensor.layer is not None]


def lowest(values: Sequence[float], count: int) -> list[int]:
    """Return the numbers of the lowest values in ascending order; the first among equals."""
    return sorted(sorted(range(len(values)), key=lambda number: (values[number], number))[:count])


def depth_result(operation: Operation, removed: Sequence[int], record: Mapping[str, object]) -> MethodResult:
    """Return the result of removing blocks.

    Args:
        operation: What the method is given.
        removed: Numbers of the blocks.
        record: Facts for the manifest.
    """
    from llmsurgery.edits.kinds import Drop, Rename

    structure = operation.structure
    tensors = block_tensors(structure)
    kept = [layer for layer in range(structure.layers) if layer not in removed]
    new = {layer: number for number, layer in enumerate(kept)}
    drops: list[Edit] = []
    renames: list[tuple[int, Edit]] = []
    for name, layer in [(t.stored, int(t.layer or 0)) for t in tensors] + _without_role(structure):
        if layer in removed:
            drops.append(Drop(name))
        elif new[layer] != layer:
            renames.append((layer, Rename(name, renumbered(structure, name, new[layer]))))
    # A name is free once the block that had it was dropped or has moved: the lower ones first.
    moved = [edit for _, edit in sorted(renames, key=lambda pair: pair[0])]
    gone = sum(tensor.parameters for tensor in tensors if tensor.layer in removed)
    total = sum(tensor.parameters for tensor in structure.tensors)
    facts = {
        "removed_layers": list(removed),
        "removed_parameters": gone,
        "removed_share_of_all": gone / total,
        **record,
    }
    edits = [*drops, *moved, *config_edits(operation.source_config, structure, operation.model, kept)]
    return MethodResult(edits, facts, [tensor for tensor in tensors if tensor.layer in removed])


def _number_at(structure: Structure, parts: Sequence[str]) -> int | None:
    """Return where in a stored name, split at its dots, the number of the block stands; None if nowhere."""
    path = next(path for path in structure.family.roles.values() if "{layer}" in path)
    blocks = path.partition(".{layer}")[0].rpartition(".")[2]
    for place in range(1, len(parts)):
        if parts[place - 1] == blocks and parts[place].isdigit():
            return place
    return None


def renumbered(structure: Structure, name: str, layer: int) -> str:
    """Return a stored name of a block with another number in it."""
    parts = name.split(".")
    place = _number_at(structure, parts)
    assert place is not None
    parts[place] = str(layer)
    return ".".join(parts)


def _without_role(structure: Structure) -> list[tuple[str, int]]:
    """Return stored names of blocks that have no role, such as masks of old releases, with their block."""
    found = []
    for name in structure.other:
        parts = name.split(".")
        if (place := _number_at(structure, parts)) is not None and int(parts[place]) < structure.layers:
            found.append((name, int(parts[place])))
    return found


def config_edits(source: Mapping[str, Any], structure: Structure, model: Any, kept: Sequence[int]) -> list[Config]:
    """Return what changes in config.json: the number of blocks, and what is said of single ones.

    Args:
        source: The parsed config.json.
        structure: The roles of the source.
        model: The loaded model, whose config knows what the file leaves to defaults.
        kept: Numbers of the blocks that stay.
    """
    from llmsurgery.edits.kinds import Config

    layers, file = structure.layers, "config.json"
    edits = [Config((file, structure.family.layers_key), len(kept))]
    resolved = model.config.get_text_config()
    for key in PER_LAYER:
        values = source.get(key, getattr(resolved, key, None))
        if isinstance(values, list | tuple) and len(values) == layers:
            chosen: list[Json] = [values[layer] for layer in kept]
            edits.append(Config((file, key), chosen))
    new = {layer: number for number, layer in enumerate(kept)}
    for key in NUMBERS:
        if isinstance(values := source.get(key), list):
            edits.append(Config((file, key), [new[layer] for layer in values if layer in new]))
    for key in FIRST:
        if isinstance(value := source.get(key), int):
            edits.append(Config((file, key), sum(layer < value for layer in kept)))
    if source.get("decoder_sparse_step", 1) != 1:
        # Every n-th block has experts: which of those that stay have none is now said one by one.
        routed = {tensor.layer for tensor in structure.tensors if tensor.role == "router"}
        edits = [edit for edit in edits if edit.path[-1] != "mlp_only_layers"]
        edits.append(Config((file, "mlp_only_layers"), [new[layer] for layer in kept if layer not in routed]))
        edits.append(Config((file, "decoder_sparse_step"), 1))
    return edits
