"""`diff`: what changed between two checkpoints, and the patch that leads from one to the other."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llmsurgery.checkpoint import Checkpoint
from llmsurgery.checkpoint.oserrors import writing
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.source import resolve_source
from llmsurgery.data.documents import parse_json
from llmsurgery.edits.build import write_patch
from llmsurgery.edits.delta import Difference, TensorDelta, compare
from llmsurgery.edits.origin import Moves, Origin
from llmsurgery.edits.patch import Patch, read_patch
from llmsurgery.edits.patch_entries import FACTORS_KEY
from llmsurgery.errors import DamagedError, InputError, UsageError
from llmsurgery.run.manifest import NAME as MANIFEST
from llmsurgery.run.record import FACTORS
from llmsurgery.run.roles import roles_of


def diff_checkpoints(
    before: str, after: str, out: str | None, force: bool, progress: Progress
) -> dict[str, object]:  # fmt: skip
    """Compare two checkpoints, and write a patch if one is asked for; see `llmsurgery.api.diff`."""
    first, second = Checkpoint.open(resolve_source(before)), Checkpoint.open(resolve_source(after))
    if out is not None:
        check_new_file(Path(out), force)
    with progress.task("comparing", len(first.tensors)) as tick:
        difference = compare(first, second, tick)
    document = describe(before, after, difference, roles_of(first))
    if out is not None:
        document["patch"] = _write(first, second, difference, Path(out), progress)
    return document


def describe(before: str, after: str, difference: Difference, role_of: Callable[[str], str]) -> dict[str, object]:
    """Return a difference as JSON values: per role, and per tensor that changed."""
    groups: dict[str, list[TensorDelta]] = {}
    for tensor in difference.tensors:
        groups.setdefault(role_of(tensor.name), []).append(tensor)
    files = difference.files
    return {
        "before": before,
        "after": after,
        "identical": not difference.changed and difference.same_structure and not files,
        "roles": {role: _summary(members) for role, members in groups.items()},
        "tensors": {
            tensor.name: {
                "role": role_of(tensor.name),
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                **_summary([tensor], single=True),
            }
            for tensor in difference.changed
        },
        "only_before": difference.only_before,
        "only_after": difference.only_after,
        "reshaped": difference.reshaped,
        "files": {
            "changed": [file.path for file in files if file.before is not None and file.after is not None],
            "added": [file.path for file in files if file.before is None],
            "removed": [file.path for file in files if file.after is None],
        },
        "patch": None,
    }


def _summary(tensors: list[TensorDelta], single: bool = False) -> dict[str, object]:
    changed = [tensor for tensor in tensors if tensor.entries_changed]
    change, before = sum(t.change_squared for t in tensors), sum(t.before_squared for t in tensors)
    norm = math.sqrt(change / before) if before else float(change > 0)
    counts: dict[str, object] = {} if single else {"tensors": len(tensors), "tensors_changed": len(changed)}
    return {
        **counts,
        "entries": sum(tensor.entries for tensor in tensors),
        "entries_changed": sum(tensor.entries_changed for tensor in tensors),
        "norm_change": norm if math.isfinite(norm) else None,
    }


def _write(
    before: Checkpoint, after: Checkpoint, difference: Difference, out: Path, progress: Progress
) -> dict[str, object]:  # fmt: skip
    kept = kept_patch(after, progress)
    moves = moves_between(before, after, kept)
    changed = [tensor.name for tensor in difference.changed if tensor.name not in moves.origins]
    factors = {} if kept is None else {name: kept.low_rank(tensor) for name, tensor in kept.tensors.items()}
    with new_file(out) as stream:
        seal = write_patch(
            stream, before, after, changed, factors, difference.files, provenance(after), moves
        )  # fmt: skip
    return {
        "path": str(out),
        "bytes": out.stat().st_size,
        "sha256": seal,
        "tensors": len({*changed, *moves.origins, *moves.gone}),
        "files": len(difference.files),
    }


def kept_patch(result: Checkpoint, progress: Progress) -> Patch | None:
    """Return the low-rank factors and origins that a run left beside its result, None if there are none.

    The builder of a patch checks them against the bytes.
    """
    path = result.root / FACTORS
    if not path.is_file():
        return None
    try:
        return read_patch(path, FACTORS_KEY)
    except (DamagedError, InputError) as error:
        progress.notice(f"the patch will be larger than it could be: {error.what} ({error.why})")
        return None


def moves_between(before: Checkpoint, after: Checkpoint, kept: Patch | None) -> Moves:
    """Return how the names and shapes of one checkpoint follow from those of another.

    Args:
        before: The first.
        after: The second.
        kept: What the run that made the second left beside it; what does not fit is passed over. A tensor of which
            nothing is known, and which the first does not hold in the same dtype and shape, is a new one.
    """
    origins: dict[str, Origin] = {}
    sources: set[str] = set()
    for tensor in kept.tensors.values() if kept is not None else ():
        own, old = after.tensors.get(tensor.name), before.tensors.get(tensor.source or "")
        fits = own is not None and (own.dtype, own.shape) == (tensor.dtype, tensor.shape)
        known = (
            old is not None and old.name not in sources and (old.dtype, old.shape) == (tensor.dtype, tensor.base_shape)
        )
        if kept is not None and not tensor.in_place and fits and (known or tensor.source is None):
            origins[tensor.name] = kept.origin(tensor)
            sources |= {tensor.source} if tensor.source is not None else set()
    stays = set()
    for name, info in after.tensors.items():
        old = before.tensors.get(name)
        if name in origins:
            continue
        if old is not None and name not in sources and (old.dtype, old.shape) == (info.dtype, info.shape):
            stays.add(name)
        else:
            origins[name] = Origin(name, info.dtype, info.shape, None)
    return Moves(origins, tuple(name for name in before.tensors if name not in sources and name not in stays))


def provenance(result: Checkpoint) -> dict[str, Any]:
    """Return the operations that made a result, as its manifest names them."""
    path = result.root / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest: Any = parse_json(path.read_text("utf-8"))
    except ValueError:
        return {}
    if not isinstance(manifest, dict):
        return {}
    kinds = {"versions": dict, "operations": list}
    return {key: manifest[key] for key, kind in kinds.items() if isinstance(manifest.get(key), kind)}


def check_new_file(path: Path, force: bool) -> None:
    """Refuse a file name that exists already.

    Raises:
        UsageError: It exists and may not be replaced, or is empty.
    """
    if not str(path).strip() or path.is_dir():
        raise UsageError(f"{str(path)!r} is no file name", "-o names the patch file", "for example -o edit.patch")
    if os.path.lexists(path) and not force:
        raise UsageError(
            f"{str(path)!r} exists", "nothing is overwritten unasked", "choose another name with -o, or give --force"
        )


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file under another name and give it its own when it is complete and on the disk.

    Raises:
        ResourceError: It cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
