"""What is refused before anything is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from llmsurgery.checkpoint import Checkpoint, Publication
from llmsurgery.errors import DamagedError, ResourceError, UsageError

from .builders import sharded, single, snapshot
from .publishing import Usage, leftovers, publish_patch

pytestmark = pytest.mark.usefixtures("no_reflink")


@pytest.mark.parametrize("existing", ["folder", "file", "dangling"])
def test_existing_output(tmp_path: Path, existing: str) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    out = tmp_path / "out"
    if existing == "folder":
        out.mkdir()
        (out / "mine").touch()
    elif existing == "file":
        out.touch()
    else:
        out.symlink_to("nowhere")
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match="--force") as caught, Publication(checkpoint, out):
        pass
    assert caught.value.exit_code == 2
    assert snapshot(tmp_path) == before
    with Publication(checkpoint, out, force=True) as publication:
        assert os.path.lexists(out)  # the old one stays until the new one is complete
        publication.publish()
    assert Checkpoint.open(out)
    assert leftovers(tmp_path) == ["m", "out"]


def test_forced_output_behind_a_link_replaces_the_link_only(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    (tmp_path / "out").symlink_to("elsewhere")
    with Publication(checkpoint, tmp_path / "out", force=True) as publication:
        publication.publish()
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "elsewhere" / "mine").exists()


def test_remains_of_an_interrupted_run(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    (tmp_path / "out.partial" / "sub").mkdir(parents=True)
    with pytest.raises(UsageError), Publication(checkpoint, tmp_path / "out"):
        pass
    assert (tmp_path / "out.partial" / "sub").exists()
    publish_patch(checkpoint, tmp_path / "out", "a.bf16", force=True)
    assert leftovers(tmp_path) == ["m", "out"]


@pytest.mark.parametrize("force", [False, True])
def test_two_runs_on_one_output(tmp_path: Path, force: bool) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    with Publication(checkpoint, tmp_path / "out") as winner:
        with pytest.raises(UsageError), Publication(checkpoint, tmp_path / "out", force=force):
            pass
        winner.publish()
    assert Checkpoint.open(tmp_path / "out")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "out", ["m", "m/", "m/out", "m/assets/out", "alias", "alias/out", "m/../m", ".", "m/..", "new/../m", "blobs", "/"]
)
def test_output_that_touches_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, force: bool) -> None:
    root = single(tmp_path / "m")
    (tmp_path / "blobs").mkdir()
    (root / "README.md").rename(tmp_path / "blobs" / "README.md")
    (root / "README.md").symlink_to(tmp_path / "blobs" / "README.md")
    (tmp_path / "alias").symlink_to("m")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    for source in (root, Path("m"), tmp_path / "alias"):
        with pytest.raises(UsageError), Publication(Checkpoint.open(source), Path(out), force=force):
            pass
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["out/m", "out.partial"])
def test_source_inside_the_output(tmp_path: Path, name: str) -> None:
    root = single(tmp_path / name)
    before = snapshot(root)
    with pytest.raises(UsageError, match="source"), Publication(Checkpoint.open(root), tmp_path / "out", force=True):
        pass
    assert snapshot(root) == before


def test_output_that_holds_the_current_or_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    (tmp_path / "home" / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UsageError, match="home"), Publication(checkpoint, tmp_path / "home", force=True):
        pass
    monkeypatch.setenv("HOME", str(tmp_path / "m"))
    monkeypatch.chdir(tmp_path / "home" / "work")
    with pytest.raises(UsageError, match="current"), Publication(checkpoint, tmp_path / "home", force=True):
        pass


def test_unknown_tensor_to_rewrite(tmp_path: Path) -> None:
    with pytest.raises(DamagedError):
        Publication(Checkpoint.open(single(tmp_path / "m")), tmp_path / "out", rewrite=["nope"])


def test_missing_parents_are_created(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    publish_patch(checkpoint, tmp_path / "x" / "y" / "out", "a.bf16")
    assert leftovers(tmp_path / "x" / "y") == ["out"]


def test_parent_that_is_a_file_or_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError) as caught, Publication(checkpoint, tmp_path / "file" / "out"):
        pass
    assert caught.value.exit_code == 7
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ResourceError), Publication(checkpoint, tmp_path / "folder" / "out"):
        pass
    assert leftovers(tmp_path / "folder") == []


def test_space_is_checked_before_copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = sharded(tmp_path / "m", rows=2000)
    checkpoint = Checkpoint.open(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 60_000))
    copied: list[object] = []
    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda *args: copied.append(args) or real(*args))
    with pytest.raises(ResourceError, match="free"), Publication(checkpoint, tmp_path / "out"):
        pass
    assert not copied
    assert leftovers(tmp_path) == ["m"]
    # Linking everything but one shard fits.
    publish_patch(checkpoint, tmp_path / "out", "a.bf16", link=True)
