"""Carry the files of a source over into an output, and remember how each one got there."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmsurgery.checkpoint.clone import can_reflink, clone_file
from llmsurgery.checkpoint.index import Checkpoint
from llmsurgery.checkpoint.inventory import Inventory
from llmsurgery.checkpoint.layout import Layout
from llmsurgery.checkpoint.oserrors import reading, writing
from llmsurgery.checkpoint.rebuild import rebuild_file
from llmsurgery.checkpoint.target import check_space
from llmsurgery.errors import DamagedError


@dataclass
class Carried:
    """What was carried over.

    Attributes:
        methods: "reflink", "copy" or "link" by relative name.
        modes: Final permission bits of the private files, by relative name.
        folder_modes: Final permission bits of the folders, by relative name; the output itself is "".
        bytes_copied: Bytes that were really copied.
        notices: What the user should be told.
    """

    methods: dict[str, str] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    folder_modes: dict[str, int] = field(default_factory=dict)
    bytes_copied: int = 0
    notices: list[str] = field(default_factory=list)


def permission_bits(path: Path) -> int:
    """Return the permission bits of a file or directory; the set-id and sticky bits are not carried over."""
    return stat.S_IMODE(path.stat().st_mode) & 0o777


def carry_over(
    source: Checkpoint, inventory: Inventory, target: Path, link: bool, rewrite: Collection[str], layout: Layout
) -> Carried:
    """Clone the files of a source into an empty directory; weight files that hold other tensors are written anew.

    Args:
        source: The checkpoint.
        inventory: Its files.
        target: The directory, which is ours alone.
        link: Hard-link what is not rewritten, where blocks cannot be shared.
        rewrite: Names of the result's tensors that will be patched; their files become private.
        layout: Where the tensors of the result lie.

    Raises:
        InputError: A file of the source is missing or may not be read.
        ResourceError: The disk is full or the target cannot be written.
        DamagedError: The source changed since its headers were read.
    """
    result = Carried()
    private = {layout.file_of(name) for name in rewrite}
    inventory = _without(inventory, {*layout.files, *layout.removed})
    with reading(source.root):
        result.folder_modes = {name: permission_bits(folder) for name, folder in inventory.folders.items()}
        result.folder_modes[""] = permission_bits(source.root)
        status = {relative: path.stat() for relative, path in inventory.files.items()}
    patched = sum(layout.tensors[name].nbytes for name in rewrite if layout.file_of(name) not in layout.files)
    rebuilt = sum(new.nbytes for new in layout.files.values())
    check_space(target, _bytes_to_copy(inventory, status, target, private if link else None, patched) + rebuilt)
    for relative in inventory.folders:
        with writing(target / relative):
            (target / relative).mkdir(mode=0o700, parents=True, exist_ok=True)
    copied_despite_link = 0
    for relative, path in inventory.files.items():
        linking = link and relative not in private
        method = clone_file(path, target / relative, linking)
        result.methods[relative] = method
        copied_despite_link += linking and method == "copy"
        if method != "link":
            result.modes[relative] = stat.S_IMODE(status[relative].st_mode) & 0o777
        if method == "copy":
            result.bytes_copied += status[relative].st_size
    for relative, new in layout.files.items():
        result.bytes_copied += rebuild_file(source, new, target / relative)
        result.methods[relative] = "copy"
        result.modes[relative] = new.mode if new.mode is not None else permission_bits(source.root / relative)
    if copied_despite_link:
        result.notices.append(f"hard links are not possible here: {copied_despite_link} files were copied instead")
    _check_sizes(source, inventory, target)
    return result


def _without(inventory: Inventory, names: Collection[str]) -> Inventory:
    files = {relative: path for relative, path in inventory.files.items() if relative not in names}
    return replace(inventory, files=files)


def _bytes_to_copy(
    inventory: Inventory,
    status: dict[str, os.stat_result],
    target: Path,
    not_linked: Collection[str] | None,
    patched: int,
) -> int:
    """Return how much space the clone takes, without writing any of it.

    Args:
        inventory: The files.
        status: Their sizes and devices.
        target: The directory to fill.
        not_linked: The files that must not be linked; None means that no file is.
        patched: Bytes of the tensors to be patched, which stop being shared when they are written.
    """
    device = target.stat().st_dev
    shares: dict[int, bool] = {}
    total = 0
    for relative, path in inventory.files.items():
        origin = status[relative].st_dev
        if origin not in shares:
            shares[origin] = can_reflink(path, target)
        linked = not_linked is not None and relative not in not_linked and origin == device
        if not shares[origin] and not linked:
            total += status[relative].st_size
    return max(total, patched)


def _check_sizes(source: Checkpoint, inventory: Inventory, target: Path) -> None:
    for relative, header in source.headers.items():
        if relative not in inventory.files:
            continue
        size = (target / relative).stat().st_size
        if size != header.file_size:
            raise DamagedError(
                f"{str(header.path)!r} changed from {header.file_size} to {size} bytes during the run",
                "another program writes to the source",
                "run again when nothing writes to the source",
            )
