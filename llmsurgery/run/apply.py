"""`apply` and `revert`: a base and a patch make a result; a result and its undo data make the base again."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from llmsurgery import __version__
from llmsurgery.checkpoint import Checkpoint, Publication
from llmsurgery.checkpoint.preflight import check_target
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.source import resolve_source
from llmsurgery.edits.apply import apply_patch, check_base, rewritten
from llmsurgery.edits.coverage import coverage
from llmsurgery.edits.patch import Patch, read_patch
from llmsurgery.edits.revert import revert_layout, revert_tensors
from llmsurgery.edits.undo import check_fit, read_undo
from llmsurgery.edits.write import Sink, TensorChange
from llmsurgery.errors import NoEffectError
from llmsurgery.run.forms import PATCH
from llmsurgery.run.manifest import FORMAT, NAME, change_record, earlier_operations, encode_manifest
from llmsurgery.run.record import CARD, Recorded, write_recorded
from llmsurgery.run.roles import roles_of, roles_with

WriteCard = Callable[[Mapping[str, object], str], str]


def apply_file(
    patch: str, base: str, out: str, link: bool, force: bool, undo: bool, progress: Progress, write_card: WriteCard
) -> dict[str, object]:
    """Apply a patch to its base; see `llmsurgery.api.apply`."""
    started = time.perf_counter()
    place = Path(patch)
    opened = read_patch(place / PATCH if (place / PATCH).is_file() else place)
    checkpoint = Checkpoint.open(resolve_source(base))
    check_target(checkpoint, Path(out), force)
    if not opened.tensors and not opened.files and not opened.gone:
        raise NoEffectError(f"the patch {patch!r} changes nothing", "it was made from two equal checkpoints", "")
    with progress.task("checking the base", len(opened.tensors)) as tick:
        check_base(opened, checkpoint, tick)
    moves = opened.moves()
    layout = moves.layout(checkpoint)
    role_of = roles_with(roles_of(checkpoint), checkpoint, opened.file_content("config.json"), layout)
    with Publication(
        checkpoint, out, link=link, force=force, rewrite=rewritten(opened), layout=layout
    ) as publication:  # fmt: skip

        def write(observe: Sink | None) -> list[TensorChange]:
            with progress.task("applying", len(opened.tensors)) as tick:
                return apply_patch(opened, checkpoint, publication, role_of, observe, tick)

        recorded = write_recorded(publication, write, undo, [file.path for file in opened.files], moves)
        for message in publication.notices:
            progress.notice(message)
        manifest = _manifest(opened, base, checkpoint, Path(out), recorded, publication)
        manifest["cost"] = {
            "seconds": round(time.perf_counter() - started, 3),
            "bytes_written": publication.bytes_written,
            "undo_bytes": recorded.undo_bytes,
        }
        card = checkpoint.root / CARD
        text = card.read_text("utf-8", "replace") if card.is_file() else ""
        publication.write_file(CARD, write_card(manifest, text).encode())
        publication.write_file(NAME, encode_manifest(manifest))
        publication.publish()
    return manifest


def _manifest(
    patch: Patch, given: str, base: Checkpoint, out: Path, recorded: Recorded, publication: Publication
) -> dict[str, object]:
    targets = [(change.name, change.role) for change in recorded.changes]
    earlier = patch.provenance.get("operations")
    step = {"task": "apply", "patch": {"sha256": patch.seal, "bytes": patch.nbytes}}
    return {
        "format": FORMAT,
        "versions": {"llmsurgery": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "source": {"path": str(base.root), "given": given, "config_sha256": patch.config_sha256},
        "out": str(out),
        "operations": [*(earlier if isinstance(earlier, list) else []), step],
        "data": {},
        "history": earlier_operations(base.root),
        "export": "plain",
        "save": "full",
        "coverage": [asdict(row) for row in coverage(targets, recorded.changes)],
        "tensors": {change.name: change_record(change) for change in recorded.changes},
        "files": recorded.files,
        "metrics": {},
        "gates": [],
        "notices": list(publication.notices),
    }


def revert_result(result: str, out: str, link: bool, force: bool, progress: Progress) -> dict[str, object]:
    """Restore the source of a result; see `llmsurgery.api.revert`."""
    started = time.perf_counter()
    root = resolve_source(result)
    undo = read_undo(root)
    checkpoint = Checkpoint.open(root)
    check_target(checkpoint, Path(out), force)
    check_fit(undo, checkpoint)
    files = undo.files()
    layout = revert_layout(undo, checkpoint)
    with Publication(
        checkpoint, out, link=link, force=force, rewrite=set(undo.tensors), layout=layout
    ) as publication:  # fmt: skip
        with progress.task("reverting", len(undo.tensors)) as tick:
            revert_tensors(undo, checkpoint, publication, tick)
        for file in files:
            if file.content is None:
                publication.remove_file(file.path)
            else:
                publication.write_file(file.path, file.content, file.mode)
        publication.publish()
    if undo.left_out:
        names = ", ".join(undo.left_out[:5])
        progress.notice(f"files of the source that were never in the result are not restored: {names}")
    return {
        "reverted": result,
        "out": str(out),
        "tensors": len(undo.tensors),
        "files": [file.path for file in files],
        "not_restored": list(undo.left_out),
        "cost": {"seconds": round(time.perf_counter() - started, 3), "bytes_written": publication.bytes_written},
    }
