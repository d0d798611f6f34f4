"""`stack`: several patches on one base, as one checkpoint or one patch."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsurgery import __version__
from llmsurgery.checkpoint import Checkpoint, Publication
from llmsurgery.checkpoint.preflight import check_target
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.source import resolve_source
from llmsurgery.edits.apply import check_base, rewritten
from llmsurgery.edits.build import write_patch
from llmsurgery.edits.coverage import coverage
from llmsurgery.edits.delta import compare_files
from llmsurgery.edits.origin import Moves
from llmsurgery.edits.patch import Patch, read_patch
from llmsurgery.edits.stack import (
    Overlap,
    apply_stack,
    conflicts,
    counts,
    find_overlaps,
    stacked_factors,
    stacked_files,
    stacked_moves,
)
from llmsurgery.edits.write import Sink, TensorChange
from llmsurgery.errors import InputError, NoEffectError, UsageError
from llmsurgery.run.diff import check_new_file, new_file
from llmsurgery.run.forms import PATCH
from llmsurgery.run.manifest import FORMAT, NAME, change_record, earlier_operations, encode_manifest
from llmsurgery.run.record import CARD, write_recorded
from llmsurgery.run.roles import roles_of, roles_with

FORMS = ("full", "patch")


@dataclass(frozen=True)
class StackRequest:
    """What `stack` is asked for.

    Attributes:
        patches: Patch files, or directories of `--save patch` runs, in order.
        base: The checkpoint that all of them were made for.
        out: Output directory, or patch file; None only looks for conflicts.
        save: "full" or "patch".
        allow_overlap: Let a later patch overwrite what an earlier one made.
        link: Hard-link untouched files.
        force: Replace an existing output.
        undo: Keep undo data beside a full result.
    """

    patches: tuple[str, ...]
    base: str
    out: str | None = None
    save: str = "full"
    allow_overlap: bool = False
    link: bool = False
    force: bool = False
    undo: bool = True


@dataclass(frozen=True)
class _Stack:
    request: StackRequest
    patches: list[Patch]
    base: Checkpoint
    overlaps: list[Overlap]
    progress: Progress

    @property
    def moves(self) -> Moves:
        return stacked_moves(self.patches)

    @property
    def roles(self) -> Callable[[str], str]:
        changed = stacked_files(self.patches).get("config.json")
        config = changed[0].file_content("config.json") if changed is not None else None
        return roles_with(roles_of(self.base), self.base, config, self.moves.layout(self.base))

    def publication(self, out: Path, link: bool) -> Publication:
        rewrite = {name for patch in self.patches for name in rewritten(patch)}
        layout = self.moves.layout(self.base)
        return Publication(self.base, out, link=link, force=self.request.force, rewrite=rewrite, layout=layout)

    def apply(self, publication: Publication, observe: Sink | None) -> list[TensorChange]:
        tensors = {name for patch in self.patches for name in patch.tensors}
        with self.progress.task("applying", len(tensors)) as tick:
            return apply_stack(self.patches, self.base, publication, self.roles, observe, tick)

    def operations(self) -> list[dict[str, Any]]:
        """Return what made the patches, and the stacking itself."""
        earlier = [patch.provenance.get("operations") for patch in self.patches]
        step = {
            "task": "stack",
            "patches": [{"sha256": patch.seal, "bytes": patch.nbytes} for patch in self.patches],
            "overlaps": dict(counts(self.overlaps)),
            "allow_overlap": self.request.allow_overlap,
        }
        return [*(one for found in earlier if isinstance(found, list) for one in found), step]


def stack_patches(
    request: StackRequest, progress: Progress, write_card: Callable[[Mapping[str, object], str], str]
) -> dict[str, object]:  # fmt: skip
    """Stack patches; see `llmsurgery.api.stack`."""
    started = time.perf_counter()
    stack = _open(request, progress)
    if blocking := conflicts(stack.overlaps, request.allow_overlap):
        raise _conflict(blocking, request)
    document: dict[str, object] = {
        "patches": list(request.patches),
        "base": request.base,
        "out": request.out,
        "save": request.save,
        "tensors": len({name for patch in stack.patches for name in patch.tensors}),
        "overlaps": [asdict(one) for one in stack.overlaps],
    }
    if request.out is None:
        return document
    if request.save == "patch":
        return document | {"patch": _write_patch(stack, Path(request.out))}
    return _write_checkpoint(stack, Path(request.out), write_card, started)


def _open(request: StackRequest, progress: Progress) -> _Stack:
    if len(request.patches) < 2:
        raise UsageError("stack needs two patches or more", "one alone is applied by `llmsurgery apply`", "")
    if request.save not in FORMS:
        raise UsageError(f"--save {request.save} does not go with stack", "a stack ends in full or patch", "")
    places = [Path(patch) for patch in request.patches]
    patches = [read_patch(place / PATCH if (place / PATCH).is_file() else place) for place in places]
    base = Checkpoint.open(resolve_source(request.base))
    if request.out is not None and request.save == "patch":
        check_new_file(Path(request.out), request.force)
    elif request.out is not None:
        check_target(base, Path(request.out), request.force)
    if not any(patch.tensors or patch.files or patch.gone for patch in patches):
        raise NoEffectError("none of the patches changes anything", "they were made from equal checkpoints", "")
    with progress.task("checking the base", sum(len(patch.tensors) for patch in patches)) as tick:
        for patch in patches:
            check_base(patch, base, tick)
    return _Stack(request, patches, base, find_overlaps(patches, base), progress)


def _conflict(blocking: Sequence[Overlap], request: StackRequest) -> InputError:
    """Name every tensor that stands in the way, as far as a message can hold them."""

    def line(one: Overlap) -> str:
        first, second = (Path(request.patches[place]).name for place in (one.first, one.second))
        return f"{one.name!r} ({one.forms[0]} in {first}, {one.forms[1]} in {second})"

    shown = ", ".join(line(one) for one in blocking[:5])
    more = f", and {len(blocking) - 5} more" if len(blocking) > 5 else ""
    moved = any(one.kind == "moved" for one in blocking)
    fix = "--allow-overlap lets the later one win" if not moved else "apply one of them, and make the other anew on it"
    return InputError(
        f"the patches conflict in {len(blocking)} places: {shown}{more}",
        "changes of one tensor add up only where all are low-rank, set different entries, or are equal",
        fix,
    )


def _write_patch(stack: _Stack, out: Path) -> dict[str, object]:
    """Write the one patch that does what all of them do."""
    base = stack.base
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    # The result exists only to be compared with the base.
    with (
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as folder,
        stack.publication(Path(folder) / "applied", link=True) as applied,
    ):
        changes = stack.apply(applied, None)
        result = Checkpoint.open(applied.path)
        names = [change.name for change in changes if change.changed]
        provenance = {"operations": stack.operations()}
        with new_file(out) as stream:
            seal = write_patch(
                stream, base, result, names, stacked_factors(stack.patches), compare_files(base, result), provenance,
                stack.moves,
            )  # fmt: skip
    return {"path": str(out), "bytes": out.stat().st_size, "sha256": seal, "tensors": len(names)}


def _write_checkpoint(
    stack: _Stack, out: Path, write_card: Callable[[Mapping[str, object], str], str], started: float
) -> dict[str, object]:  # fmt: skip
    base, request = stack.base, stack.request
    with stack.publication(out, request.link) as publication:
        recorded = write_recorded(
            publication,
            lambda observe: stack.apply(publication, observe),
            request.undo,
            list(stacked_files(stack.patches)),
            stack.moves,
        )
        for message in publication.notices:
            stack.progress.notice(message)
        targets = [(change.name, change.role) for change in recorded.changes]
        manifest: dict[str, object] = {
            "format": FORMAT,
            "versions": {"llmsurgery": __version__, "python": platform.python_version(), "numpy": np.__version__},
            "source": {
                "path": str(base.root),
                "given": request.base,
                "config_sha256": stack.patches[0].config_sha256,
            },
            "out": str(out),
            "operations": stack.operations(),
            "data": {},
            "history": earlier_operations(base.root),
            "export": "plain",
            "save": "full",
            "overlaps": [asdict(one) for one in stack.overlaps],
            "coverage": [asdict(row) for row in coverage(targets, recorded.changes)],
            "tensors": {change.name: change_record(change) for change in recorded.changes},
            "files": recorded.files,
            "metrics": {},
            "gates": [],
            "notices": list(publication.notices),
            "cost": {
                "seconds": round(time.perf_counter() - started, 3),
                "bytes_written": publication.bytes_written,
                "undo_bytes": recorded.undo_bytes,
            },
        }
        card = base.root / CARD
        text = card.read_text("utf-8", "replace") if card.is_file() else ""
        publication.write_file(CARD, write_card(manifest, text).encode())
        publication.write_file(NAME, encode_manifest(manifest))
        publication.publish()
    return manifest
