"""Publish an edited checkpoint: build it under another name, and rename it when it is complete.

Untouched files are cloned, tensors are patched by byte range in private copies, and no name of the output exists
before all of it is on the disk.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from llmsurgery.checkpoint.carry import Carried, carry_over, permission_bits
from llmsurgery.checkpoint.clone import set_mode, write_at
from llmsurgery.checkpoint.dtypes import storage_dtype
from llmsurgery.checkpoint.header import TensorInfo
from llmsurgery.checkpoint.index import Checkpoint
from llmsurgery.checkpoint.inventory import STATE, Inventory
from llmsurgery.checkpoint.layout import Layout
from llmsurgery.checkpoint.oserrors import writing
from llmsurgery.checkpoint.paths import inside_name
from llmsurgery.checkpoint.target import (
    Claim,
    check_free,
    check_relation,
    move_into_place,
    partial_of,
    remove,
    sync_directory,
)
from llmsurgery.errors import ResourceError


class Publication:
    """A copy of a checkpoint under construction, as a context manager.

    Leaving the block without `publish()` removes what was built, unless `keep` is set.

    Args:
        source: The checkpoint to copy; it is never changed.
        out: The directory to create.
        link: Hard-link files that are not rewritten, where blocks cannot be shared.
        force: Replace an existing output and the remains of an interrupted run.
        rewrite: Names of the result's tensors that will be patched.
        layout: Where the tensors of the result lie; where the source's lie by default.
        carry: Start from a copy of the source; without it the output holds only what is written into it.
        claim: The directory under construction, if the run holds it already; what is in it but its state is replaced,
            and it stays the run's when the block ends without `publish()`.

    Attributes:
        path: The directory under construction.
        skipped: Files of the source that were left out as stale copies of the weights.
        notices: What the user should be told.
        methods: How each file was carried over: "reflink", "copy" or "link".
        bytes_written: Bytes copied, patched and written so far; shared blocks and links count nothing.
        keep: Leave the directory under construction behind when the block ends without `publish()`.
    """

    def __init__(
        self,
        source: Checkpoint,
        out: Path | str,
        *,
        link: bool = False,
        force: bool = False,
        rewrite: Collection[str] = (),
        layout: Layout | None = None,
        carry: bool = True,
        claim: Claim | None = None,
    ) -> None:
        self.source = source
        # An output such as "." or "x/.." has no name to append to until it is resolved.
        self.out = Path(out) if Path(out).name not in ("", "..") else Path(out).resolve()
        self.path = partial_of(self.out)
        self.link = link
        self.force = force
        self.carry = carry
        self.layout = layout or Layout.of(source)
        self.rewrite = frozenset(rewrite)
        for name in self.rewrite - self.layout.tensors.keys():
            source.info(name)  # an unknown name is refused before anything is built
            raise ValueError(f"tensor {name!r} is to be patched and has no place in the result")
        self.skipped: list[str] = []
        self.notices: list[str] = []
        self.methods: dict[str, str] = {}
        self.bytes_written = 0
        self.keep = False
        self._carried = Carried()
        self._open_files: dict[str, int] = {}
        self._replaced: set[str] = set()
        self._given = claim
        self._claim: Claim | None = None

    def __enter__(self) -> Self:
        inventory = Inventory.of(self.source)
        check_relation(self.source.root, inventory.files.values(), self.out)
        check_free(self.out, self.force)
        self._claim = self._given or Claim(self.out, self.force)
        complete = False
        try:
            if not self.carry:
                inventory, self.layout = Inventory({}, {}, [], []), Layout.of(self.source)
            self._carried = carry_over(self.source, inventory, self.path, self.link, self.rewrite, self.layout)
            self.methods = self._carried.methods
            self.bytes_written = self._carried.bytes_copied
            self.skipped = inventory.skipped
            self.notices += inventory.notices + self._carried.notices
            if self.layout.index is not None and self.source.index_file is not None:
                self.write_file(self.source.index_file, self.layout.index)
            complete = True
        finally:
            # __exit__ is not called when __enter__ fails.
            if not complete:
                self.discard()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.keep:
            self._release()
        else:
            self.discard()

    def patch_rows(self, name: str, start_row: int, raw: npt.NDArray[Any]) -> None:
        """Overwrite rows of a tensor in the private copy.

        Args:
            name: Stored name, one of `rewrite`.
            start_row: First row to overwrite; 0 for a scalar.
            raw: The new rows as stored: dtype `storage_dtype(info.dtype)`, [rows, ...].

        Raises:
            ValueError: The tensor was not declared in `rewrite`, or dtype, shape or bounds do not fit.
            DamagedError: The source holds no such tensor.
            ResourceError: The disk is full, or the copy has a second name.
        """
        info = self.layout.tensors.get(name) or self.source.info(name)
        if name not in self.rewrite:
            raise ValueError(f"tensor {name!r} was not declared in rewrite")
        if raw.dtype != storage_dtype(info.dtype):
            raise ValueError(f"rows of {name!r} are {raw.dtype}, stored are {storage_dtype(info.dtype)}")
        count = raw.shape[0] if raw.ndim else 1
        fits = raw.ndim == len(info.shape) and raw.shape[1:] == info.shape[1:]
        if not fits or start_row < 0 or start_row + count > info.rows:
            raise ValueError(f"rows {start_row}+{raw.shape} do not fit tensor {name!r} of shape {info.shape}")
        descriptor = self._writable(info)
        content = np.ascontiguousarray(raw).reshape(-1).view(np.uint8).data
        path = self.path / self.layout.file_of(name)
        write_at(descriptor, content, info.start + start_row * info.row_nbytes, path)
        self.bytes_written += len(content)

    def _writable(self, info: TensorInfo) -> int:
        self._require_open()
        relative = self.layout.file_of(info.name)
        if relative in self._replaced:
            raise ValueError(f"{relative!r} was replaced as a whole; its byte ranges are unknown")
        descriptor = self._open_files.get(relative)
        if descriptor is None:
            path = self.path / relative
            with writing(path):
                # What a second name shares would be damaged by writing, so it is looked at before it is opened.
                links = path.lstat().st_nlink
                if links != 1:
                    raise ResourceError(
                        f"{str(path)!r} has {links} names",
                        "a file with more than one name is never written, because the other one would change as well",
                        "run again, and link nothing to files of an unfinished output",
                    )
                descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._open_files[relative] = descriptor
        return descriptor

    @contextmanager
    def new_file(self, relative: str, mode: int | None = None) -> Iterator[BinaryIO]:
        """Open a new file of the output for writing; it replaces a cloned one when the block ends without error.

        Args:
            relative: Its name inside the output.
            mode: Its permission bits; those of the source's file of that name, or the usual ones, by default.

        Raises:
            DamagedError: The name leads out of the output.
            ResourceError: The disk is full or the file cannot be written.
        """
        self._require_open()
        name = inside_name(relative, "an edit")
        target = self.path / name
        temporary = target.with_name(f".{secrets.token_hex(6)}.tmp")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            # Exclusive and renamed over the old name: a hard-linked file keeps its bytes under its other name.
            with temporary.open("xb") as stream:
                try:
                    yield stream
                    stream.flush()
                    size = os.fstat(stream.fileno()).st_size
                    temporary.replace(target)
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise
        descriptor = self._open_files.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)
        if self.methods.pop(name, None) == "link":
            self._carried.modes[name] = permission_bits(self.source.root / name)
        if mode is not None:
            self._carried.modes[name] = mode & 0o777
        self._replaced.add(name)
        self.bytes_written += size

    def remove_file(self, relative: str) -> None:
        """Leave a cloned file out of the output.

        Args:
            relative: Its name inside the output.

        Raises:
            DamagedError: The name leads out of the output.
            ResourceError: It cannot be removed.
        """
        self._require_open()
        name = inside_name(relative, "an edit")
        with writing(self.path / name):
            (self.path / name).unlink(missing_ok=True)
            for folder in list((self.path / name).parents)[: name.count("/")]:
                if any(folder.iterdir()):
                    break
                folder.rmdir()
        self.methods.pop(name, None)
        self._carried.modes.pop(name, None)

    def write_file(self, relative: str, content: bytes, mode: int | None = None) -> None:
        """Write a file of the output, replacing a cloned one.

        Args:
            relative: Its name inside the output.
            content: Its bytes.
            mode: As for `new_file`.

        Raises:
            DamagedError: The name leads out of the output.
            ResourceError: The disk is full or the file cannot be written.
        """
        with self.new_file(relative, mode) as stream:
            stream.write(content)

    def publish(self, spent: Path | None = None) -> None:
        """Put everything on the disk and give the output its name.

        Args:
            spent: A directory beside the output that led to it and goes with the run's state, so that a run that is
                killed at any moment leaves either what it can go on from or the output alone.

        Raises:
            UsageError: The output came into being meanwhile.
            ResourceError: The disk is full or fails, or the name cannot be given.
        """
        self._require_open()
        self._close_files()
        folders = [""]
        for folder, names, files in os.walk(self.path):
            if Path(folder) == self.path and STATE in names:
                names.remove(STATE)
            prefix = Path(folder).relative_to(self.path)
            folders += [(prefix / name).as_posix() for name in names]
            for file in files:
                self._finish_file((prefix / file).as_posix())
        check_free(self.out, self.force)
        # Only now, when all else is on the disk: a run that is killed before goes on from its state.
        remove(self.path / STATE)
        if spent is not None:
            with writing(spent):
                # Moved at once, then removed: from one that is half removed nothing could go on.
                spent.rename(self.path / STATE)
            remove(self.path / STATE)
        # Children first: a parent without write permission may not stand in the way.
        for relative in reversed(folders):
            path = self.path / relative
            sync_directory(path)
            # A folder that the source does not have gets what the source's root has.
            with writing(path):
                set_mode(path, self._carried.folder_modes.get(relative, self._carried.folder_modes[""]))
        aside = move_into_place(self.path, self.out, self.force)
        self._release()
        sync_directory(self.out.absolute().parent)
        if aside is not None:
            self._remove(aside)

    def _finish_file(self, relative: str) -> None:
        if self.methods.get(relative) == "link":
            return
        path = self.path / relative
        with writing(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                mode = self._carried.modes.get(relative)
                if mode is not None and os.fstat(descriptor).st_nlink == 1:
                    set_mode(descriptor, mode)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def discard(self) -> None:
        """Remove what was built; nothing happens after `publish()` or a second time."""
        claim = self._claim
        if claim is None:
            return
        self._close_files()
        self._claim = None
        # What cannot be removed must not hide the error that led here.
        try:
            if claim is self._given:
                claim.clear()
            else:
                claim.discard()
        except ResourceError as error:
            self.notices.append(f"could not remove {str(self.path)!r}: {error.why}")

    def _remove(self, path: Path) -> None:
        # What cannot be removed must not undo a finished publication.
        try:
            remove(path)
        except ResourceError as error:
            self.notices.append(f"could not remove {str(path)!r}: {error.why}")

    def _require_open(self) -> None:
        if self._claim is None:
            raise ValueError("this publication is not open")

    def _close_files(self) -> None:
        while self._open_files:
            os.close(self._open_files.popitem()[1])

    def _release(self) -> None:
        self._close_files()
        if self._claim is not None:
            self._claim.release()
            self._claim = None
