"""Turn a patch into bytes: the base is checked first, every tensor's digest afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod

import numpy as np

from llmsurgery.checkpoint import Checkpoint, Publication, file_digest, storage_dtype, tensor_digest
from llmsurgery.checkpoint.container import PartReader
from llmsurgery.edits.delta import side_files
from llmsurgery.edits.evaluate import evaluate_rows
from llmsurgery.edits.indices import FlagReader
from llmsurgery.edits.kinds import LowRank
from llmsurgery.edits.origin import Stored
from llmsurgery.edits.patch import Patch
from llmsurgery.edits.patch_entries import FilePatch, TensorPatch
from llmsurgery.edits.write import Sink, Streamed, TensorChange, gone_tensor, moved_tensor, records_of, write_tensor
from llmsurgery.errors import DamagedError, InputError

_OTHER_BASE = "a patch is byte-exact and fits only the checkpoint it was made for"
_FIX = "give the base that the patch was made from; `llmsurgery diff` shows how two checkpoints differ"


def check_base(patch: Patch, base: Checkpoint, tick: Callable[[], object] = lambda: None) -> None:
    """Refuse a base that is not the one the patch was made for.

    Args:
        patch: The patch.
        base: The checkpoint.
        tick: Called once per tensor.

    Raises:
        InputError: Names the first tensor, or else the file, that differs.
    """
    left = {*patch.gone, *(tensor.source for tensor in patch.tensors.values())}
    for tensor in patch.tensors.values():
        if tensor.name in base.tensors and tensor.name not in left:
            raise _another_base(patch, base, f"tensor {tensor.name!r} is in it")
        if tensor.source is not None:
            info = base.tensors.get(tensor.source)
            if info is not None and (info.dtype, info.shape) != (tensor.dtype, tensor.base_shape):
                found = f"{info.dtype} {list(info.shape)}, the patch expects {tensor.dtype} {list(tensor.base_shape)}"
                raise _another_base(patch, base, f"tensor {tensor.source!r} is {found}")
            _check_tensor(patch, base, tensor.source, tensor.before)
        tick()
    for name, before in patch.gone.items():
        _check_tensor(patch, base, name, before)
    if file_digest(base.root / "config.json") != patch.config_sha256:
        raise _another_base(patch, base, "config.json differs")
    present = side_files(base)
    weights = {name.lower() for name in base.headers}
    for file in patch.files:
        if file.path.lower() in weights:
            raise _another_base(patch, base, f"{file.path} holds weights of it")
        digest = file_digest(present[file.path]) if file.path in present else None
        if digest != file.before:
            raise _another_base(patch, base, f"{file.path} differs")


def _check_tensor(patch: Patch, base: Checkpoint, name: str, digest: str | None) -> None:
    info = base.tensors.get(name)
    if info is None:
        raise _another_base(patch, base, f"tensor {name!r} is not in it")
    if tensor_digest(info.path, info.start, info.end) != digest:
        raise _another_base(patch, base, f"tensor {name!r} differs")


def _another_base(patch: Patch, base: Checkpoint, what: str) -> InputError:
    return InputError(f"{str(patch.path)!r} is for another base than {str(base.root)!r}: {what}", _OTHER_BASE, _FIX)


def apply_patch(
    patch: Patch,
    base: Checkpoint,
    publication: Publication,
    role_of: Callable[[str], str],
    observe: Sink | None = None,
    tick: Callable[[], object] = lambda: None,
) -> list[TensorChange]:
    """Apply a patch to the private copy inside a publication.

    Args:
        patch: The patch, whose base has been checked.
        base: The source of the publication.
        publication: The open publication, whose `rewrite` and `layout` are those of `rewritten` and of the moves.
        role_of: Maps a stored name to its role for the report.
        observe: Receives every changed block, for undo data.
        tick: Called once per tensor.

    Raises:
        DamagedError: The result is not the one that the patch was made from.
    """
    moves = patch.moves()
    streamed = {}
    for tensor in patch.tensors.values():
        streamed[tensor.name] = write_patched(patch, tensor, base, publication, observe)
        check_written(patch, tensor, streamed[tensor.name])
        tick()
    gone = {name: gone_tensor(base, name, observe) for name in patch.gone}
    names = {tensor.source or tensor.name: None for tensor in patch.tensors.values()} | dict.fromkeys(patch.gone)
    changes = records_of(base, names | dict.fromkeys(patch.tensors), moves, streamed, gone, role_of)
    write_patch_files(patch, patch.files, publication)
    return changes


def write_patch_files(patch: Patch, files: Iterable[FilePatch], publication: Publication) -> None:
    """Write or remove side files as a patch says.

    Raises:
        DamagedError: A file is not the one that the patch was made from.
    """
    for file in files:
        if file.content is None:
            publication.remove_file(file.path)
            continue
        with publication.new_file(file.path, file.mode) as stream:
            reader = patch.reader(file.content)
            while piece := reader.take(1 << 22):
                stream.write(piece)
        if file_digest(publication.path / file.path) != file.after:
            raise DamagedError(f"{file.path} in {str(patch.path)!r} is damaged", "its SHA-256 differs", "make it again")


def rewritten(patch: Patch) -> set[str]:
    """Return the names of the result's tensors that get new bytes."""
    return {tensor.name for tensor in patch.tensors.values() if tensor.rewritten}


def write_patched(
    patch: Patch, tensor: TensorPatch, base: Checkpoint, publication: Publication, observe: Sink | None
) -> Streamed:  # fmt: skip
    """Write one tensor as a patch says."""
    if tensor.source is not None and not tensor.rewritten:
        return moved_tensor(base, tensor.source)
    rows = PatchedRows(patch, tensor)
    seen = write_tensor(base, rows.origin, rows.compute, publication, observe)
    rows.finish()
    return seen


def check_written(patch: Patch, tensor: TensorPatch, seen: Streamed) -> None:
    """Refuse a tensor that is not the one that the patch was made from.

    Raises:
        DamagedError: Its digest differs.
    """
    if seen.after != tensor.after:
        raise DamagedError(
            f"tensor {tensor.name!r} came out different from what {str(patch.path)!r} promises",
            "its SHA-256 differs although base and patch are the right ones",
            "report it with the processor and the numpy version: low-rank sums must agree on every machine",
        )


class PatchedRows:
    """Computes the new rows of one tensor, block by block from the first to the last."""

    def __init__(self, patch: Patch, tensor: TensorPatch) -> None:
        self.origin = patch.origin(tensor)
        self.terms: Sequence[LowRank] = patch.low_rank(tensor)
        self.dense: PartReader | None = None
        self.values: PartReader | None = None
        self.flags: FlagReader | None = None
        if tensor.exact is not None:
            values = patch.reader(tensor.exact.values) if tensor.exact.values is not None else None
            if tensor.exact.at is None:
                self.dense = values
            else:
                self.values = values
                self.flags = FlagReader(tensor.exact.encoding, patch.reader(tensor.exact.at), prod(tensor.shape))

    def compute(self, raw: Stored, start: int, stop: int) -> Stored:
        """Return the new rows that come from rows `start:stop` of the base; must be called in order."""
        kind = storage_dtype(self.origin.dtype)
        raw = self.origin.take(raw, start)
        start, stop = self.origin.rows(start, stop)
        if self.dense is not None:
            return np.frombuffer(self._take(self.dense, raw.nbytes), dtype=kind).reshape(raw.shape)
        result = evaluate_rows(self.terms, raw, self.origin, start, stop) if self.terms else raw.copy()
        if self.flags is not None:
            flags = self.flags.take(raw.size).reshape(raw.shape)
            count = int(np.count_nonzero(flags))
            if self.values is None:
                result[flags] = np.zeros((), dtype=kind)
            elif count:
                result[flags] = np.frombuffer(self._take(self.values, count * kind.itemsize), dtype=kind)
        return result

    def finish(self) -> None:
        """Check that the patch held no more than the tensor took.

        Raises:
            DamagedError: It did.
        """
        if self.flags is not None:
            self.flags.finish()
        if self.values is not None and self.values.left:
            raise self._damaged()

    def _take(self, reader: PartReader, count: int) -> bytearray:
        content = reader.take(count)
        if len(content) != count:
            raise self._damaged()
        return content

    def _damaged(self) -> DamagedError:
        return DamagedError(
            f"the patch holds another number of values for {self.origin.name!r} than positions",
            "the patch was not made by this program, or is damaged",
            "make the patch again",
        )
