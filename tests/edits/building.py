"""What the tests of edits share: checkpoints of a few tensors, and the way from edits to a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmsurgery.checkpoint import Checkpoint, Publication, encode
from llmsurgery.checkpoint.container import Part, write_container
from llmsurgery.edits.apply import apply_patch, check_base, rewritten
from llmsurgery.edits.arrange import arrange
from llmsurgery.edits.build import write_patch
from llmsurgery.edits.delta import compare
from llmsurgery.edits.kinds import StoredEdit
from llmsurgery.edits.patch import Patch, read_patch
from llmsurgery.edits.revert import revert_layout, revert_tensors
from llmsurgery.edits.undo import read_undo
from llmsurgery.edits.write import Sink, TensorChange, write_edits
from llmsurgery.run.diff import moves_between
from llmsurgery.run.record import keep_factors, low_rank_factors, write_recorded

WEIGHTS = "model.safetensors"


def checkpoint(root: Path, tensors: Mapping[str, tuple[str, np.ndarray[Any, Any]]]) -> Checkpoint:
    """Write a checkpoint from (dtype code, stored entries)."""
    root.mkdir()
    (root / "config.json").write_text('{"model_type": "other"}')
    parts = [Part(name, code, raw.shape, partial(iter, [raw.tobytes()])) for name, (code, raw) in tensors.items()]
    with (root / WEIGHTS).open("wb") as stream:
        write_container(stream, parts, {"format": "pt"})
    return Checkpoint.open(root)


def matrix(root: Path, code: str, shape: tuple[int, ...], seed: int = 0) -> Checkpoint:
    """A checkpoint with the tensors `w` and `untouched`."""
    values = np.random.default_rng(seed).standard_normal(shape) * 0.02
    return checkpoint(root, {"untouched": (code, encode(values[:1], code)), "w": (code, encode(values, code))})


def write(
    base: Checkpoint, out: Path, edits: Sequence[StoredEdit], undo: bool = True, link: bool = False
) -> Checkpoint:  # fmt: skip
    arranged = arrange(base, edits)
    with Publication(base, out, rewrite=arranged.rewrite, layout=arranged.layout, link=link) as publication:

        def write(observe: Sink | None) -> list[TensorChange]:
            return write_edits(base, publication, edits, lambda name: "other", observe)

        recorded = write_recorded(publication, write, undo, moves=arranged.moves)
        if undo:
            keep_factors(publication, edits, recorded.changes)
        publication.publish()
    return Checkpoint.open(out)


def make_patch(path: Path, base: Checkpoint, result: Checkpoint, edits: Sequence[StoredEdit] = ()) -> Patch:
    """The patch of a run with these edits; without them that of two checkpoints of which nothing else is known."""
    difference = compare(base, result)
    moves = arrange(base, edits).moves if edits else moves_between(base, result, None)
    names = [tensor.name for tensor in difference.changed]
    with path.open("wb") as stream:
        write_patch(stream, base, result, names, low_rank_factors(base, edits), difference.files, {}, moves)
    return read_patch(path)


def apply(patch: Patch, base: Checkpoint, out: Path) -> Checkpoint:
    check_base(patch, base)
    layout = patch.moves().layout(base)
    with Publication(base, out, rewrite=rewritten(patch), layout=layout) as publication:
        apply_patch(patch, base, publication, lambda name: "other")
        publication.publish()
    return Checkpoint.open(out)


def revert(result: Checkpoint, out: Path) -> Checkpoint:
    undo = read_undo(result.root)
    layout = revert_layout(undo, result)
    with Publication(result, out, rewrite=set(undo.tensors), layout=layout) as publication:
        revert_tensors(undo, result, publication)
        for file in undo.files():
            if file.content is not None:
                publication.write_file(file.path, file.content, file.mode)
        publication.publish()
    return Checkpoint.open(out)


def content(found: Checkpoint) -> bytes:
    return (found.root / WEIGHTS).read_bytes()
