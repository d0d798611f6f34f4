"""Patches, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from os import fspath
from typing import TYPE_CHECKING

from llmsurgery.api.requests import File

if TYPE_CHECKING:
    from llmsurgery.compute.progress import Progress


def diff(
    before: File, after: File, *, out: File | None = None, force: bool = False, progress: Progress | None = None
) -> dict[str, object]:
    """Compare two checkpoints, and optionally write the patch that leads from the first to the second.

    Args:
        before: Checkpoint directory, `.gguf` file or hub id.
        after: The same.
        out: Patch file to write.
        force: Replace an existing patch file.
        progress: Told of long work.

    Returns:
        Per role and per changed tensor: entries changed and relative norm; tensors that only one holds; side files
        that differ; the patch's path and size.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.run.diff import diff_checkpoints

    place = None if out is None else fspath(out)
    return diff_checkpoints(fspath(before), fspath(after), place, force, progress or Silent())


def apply(
    patch: File,
    base: File,
    *,
    out: File,
    link: bool = False,
    force: bool = False,
    undo: bool = True,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Apply a patch to the base it was made for; the result has the bytes that the patch was made from.

    Args:
        patch: Patch file, or the directory of a `--save patch` run.
        base: Checkpoint directory, `.gguf` file or hub id.
        out: Output directory.
        link: Hard-link untouched files.
        force: Replace an existing output.
        undo: Keep the undo data that `revert` needs.
        progress: Told of long work.

    Returns:
        The manifest.

    Raises:
        InputError: The patch is for another base.
        DamagedError: The patch is damaged.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.card import write_card
    from llmsurgery.run.apply import apply_file

    return apply_file(
        fspath(patch), fspath(base), fspath(out), link, force, undo, progress or Silent(), write_card
    )  # fmt: skip


def stack(
    patches: Sequence[File],
    base: File,
    *,
    out: File | None = None,
    save: str = "full",
    allow_overlap: bool = False,
    link: bool = False,
    force: bool = False,
    undo: bool = True,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Put several patches for one base together.

    Patches of different tensors go together in any order, and so do low-rank changes of one tensor (they are summed
    and rounded once), changes of different entries, and equal ones.

    Args:
        patches: Patch files, or directories of `--save patch` runs; their order matters with `allow_overlap` alone.
        base: The checkpoint that all of them were made for.
        out: Output directory, or file of the one patch; None only looks for conflicts.
        save: "full" for a checkpoint, "patch" for one patch that does what all of them do.
        allow_overlap: Where they conflict, let the later one overwrite what the earlier one made.
        link: Hard-link untouched files.
        force: Replace an existing output.
        undo: Keep the undo data that `revert` needs.
        progress: Told of long work.

    Returns:
        The manifest of a checkpoint, else what would be or was put together; with `overlaps`, every tensor or file
        that two patches change, and how they meet.

    Raises:
        InputError: A patch is for another base, or two patches conflict; names the tensors.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.card import write_card
    from llmsurgery.run.stack import StackRequest, stack_patches

    place = None if out is None else fspath(out)
    request = StackRequest(
        tuple(fspath(patch) for patch in patches), fspath(base), place, save, allow_overlap, link, force, undo
    )
    return stack_patches(request, progress or Silent(), write_card)


def revert(
    result: File, *, out: File, link: bool = False, force: bool = False, progress: Progress | None = None
) -> dict[str, object]:
    """Give the source of a result back, bit for bit, from the undo data beside the result.

    Args:
        result: Output directory of an operation or of `apply`.
        out: Directory for the source.
        link: Hard-link untouched files.
        force: Replace an existing output.
        progress: Told of long work.

    Returns:
        What was restored.

    Raises:
        InputError: There is nothing to revert.
        DamagedError: The result was changed, or the undo data are damaged.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.run.apply import revert_result

    return revert_result(fspath(result), fspath(out), link, force, progress or Silent())


def verify(
    path: File, *, base: File | None = None, trust_remote_code: bool = False, progress: Progress | None = None
) -> dict[str, object]:
    """Check a result: hashes, finite weights, stock loadability.

    Args:
        path: Checkpoint directory, with or without `surgery.json`, or the directory of a patch or adapter.
        base: The model it was made from; everything that was not edited must be equal to it.
        trust_remote_code: Run model code that the checkpoint brings.
        progress: Told of long work.

    Returns:
        The checks, all of which passed.

    Raises:
        DamagedError: Something differs.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.run.verify import verify_result

    return verify_result(
        fspath(path), None if base is None else fspath(base), trust_remote_code, progress or Silent()
    )  # fmt: skip
