"""Disks that fill up, interrupts and programs that meddle: nothing half-finished may remain."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from llmsurgery.checkpoint import Checkpoint, Publication
from llmsurgery.errors import DamagedError, ResourceError, UsageError

from .builders import sharded, single, snapshot
from .publishing import Usage, leftovers, open_descriptors, publish_patch, refuse

pytestmark = pytest.mark.usefixtures("no_reflink")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("call", ["copy_file_range", "pwrite", "fsync"])
@pytest.mark.parametrize("force", [False, True])
def test_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, force: bool) -> None:
    root = sharded(tmp_path / "m")
    checkpoint = Checkpoint.open(root)
    out = tmp_path / "out"
    if force:
        out.mkdir()
        (out / "old").touch()
    before = snapshot(tmp_path)
    if call == "copy_file_range":
        monkeypatch.setattr(os, "pwrite", refuse(code))  # where the kernel's copy is refused, so is the other
    monkeypatch.setattr(os, call, refuse(code))
    with pytest.raises(ResourceError) as caught:
        publish_patch(checkpoint, out, "a.bf16", force=force)
    assert caught.value.exit_code == 7
    assert caught.value.fix
    monkeypatch.undo()
    after = snapshot(tmp_path)
    before.pop(".")
    after.pop(".")
    assert after == before


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, content, at: real(descriptor, content[:7], at))
    publish_patch(checkpoint, tmp_path / "out", "a.bf16")
    expected = checkpoint.read("a.bf16")
    expected[2:5] ^= 1
    np.testing.assert_array_equal(Checkpoint.open(tmp_path / "out").read("a.bf16"), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("moment", ["clone", "edit"])
def test_a_crash_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], moment: str
) -> None:
    root = sharded(tmp_path / "m")
    before = snapshot(root)
    descriptors = open_descriptors()
    calls: list[int] = []

    def crash(*_: object) -> int:
        calls.append(1)
        if len(calls) > 2 or moment == "edit":
            raise error
        return 0

    if moment == "clone":
        monkeypatch.setattr(os, "copy_file_range", crash)

    def run() -> None:
        with Publication(Checkpoint.open(root), tmp_path / "out", rewrite=["a.f32"]) as publication:
            publication.patch_rows("a.f32", 0, np.zeros((8, 3), "<f4"))
            crash()

    with pytest.raises(error):
        run()
    assert leftovers(tmp_path) == ["m"]
    assert snapshot(root) == before
    assert open_descriptors() == descriptors


def test_leaving_without_publishing_and_keeping(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    with Publication(checkpoint, tmp_path / "out") as publication:
        assert publication.path == tmp_path / "out.partial"
    assert leftovers(tmp_path) == ["m"]
    with Publication(checkpoint, tmp_path / "out") as publication:
        publication.keep = True
    assert leftovers(tmp_path) == ["m", "out.partial"]
    with Publication(checkpoint, tmp_path / "out", force=True) as publication:
        publication.discard()
        publication.discard()
        with pytest.raises(ValueError, match="not open"):
            publication.publish()
    assert leftovers(tmp_path) == ["m"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), KeyboardInterrupt()])
def test_failed_rename_puts_the_old_output_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "out.partial":
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    kind = ResourceError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind):
        publish_patch(checkpoint, tmp_path / "out", "a.bf16", force=True)
    assert (tmp_path / "out" / "old").exists()
    assert leftovers(tmp_path) == ["m", "out"]


def test_output_that_appears_during_the_run(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    with Publication(checkpoint, tmp_path / "out") as publication:
        (tmp_path / "out").mkdir()
        with pytest.raises(UsageError):
            publication.publish()
    assert leftovers(tmp_path) == ["m", "out"]
    assert leftovers(tmp_path / "out") == []


def test_source_that_changes_during_the_run(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    checkpoint = Checkpoint.open(root)
    with (root / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(DamagedError, match="changed"), Publication(checkpoint, tmp_path / "out"):
        pass
    assert leftovers(tmp_path) == ["m"]


def test_full_disk_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=256k tmpfs '{disk}' 2>/dev/null") != 0:
        pytest.skip("cannot mount a small file system here")
    try:
        root = single(tmp_path / "m", rows=2000)
        before = snapshot(root)
        checkpoint = Checkpoint.open(root)
        with Publication(checkpoint, disk / "out", link=True) as publication:
            with pytest.raises(ResourceError):
                publication.write_file("big", bytes(1 << 20))
            publication.publish()
        assert any("hard links" in notice for notice in publication.notices)
        (disk / "filler").write_bytes(bytes(150 << 10))
        with pytest.raises(ResourceError, match="free"), Publication(checkpoint, disk / "again"):
            pass
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 10**9))
        with pytest.raises(ResourceError, match="No space"), Publication(checkpoint, disk / "again"):
            pass
        assert leftovers(disk) == ["filler", "out"]
        assert snapshot(root) == before
        names = {path.name for path in (disk / "out").iterdir()}
        assert names == {path.name for path in root.iterdir()}
    finally:
        os.system(f"umount '{disk}'")
