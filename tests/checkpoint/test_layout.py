"""Where the tensors of a result lie, and files that are written anew."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from llmsurgery.checkpoint import Checkpoint, Publication
from llmsurgery.checkpoint.header import encode_header, parse_header, read_header
from llmsurgery.checkpoint.layout import Layout, Slot, rearrange
from llmsurgery.errors import DamagedError, ResourceError

from .builders import sharded, single, snapshot
from .publishing import FIRST, SECOND, leftovers, refuse


def slots(source: Checkpoint, *more: Slot, without: tuple[str, ...] = ()) -> list[Slot]:
    kept = [Slot(name, i.dtype, i.shape, name, True) for name, i in source.tensors.items() if name not in without]
    return [*kept, *more]


def new(name: str, length: int = 3, code: str = "F32") -> Slot:
    return Slot(name, code, (length,), None, False)


def publish(source: Checkpoint, out: Path, layout: Layout, **options: bool) -> Checkpoint:
    rewrite = [name for name in layout.tensors if name not in source.tensors]
    with Publication(source, out, rewrite=rewrite, layout=layout, **options) as publication:
        for name in rewrite:
            publication.patch_rows(name, 0, np.arange(3, dtype="<f4"))
        publication.publish()
    return Checkpoint.open(out)


def test_header_is_written_as_it_is_read(tmp_path: Path) -> None:
    single(tmp_path / "base")
    header = read_header(tmp_path / "base" / "model.safetensors")
    entries = [(name, info.dtype, info.shape) for name, info in header.tensors.items()]
    prefix = encode_header(entries, header.metadata)
    assert len(prefix) % 8 == 0
    size = len(prefix) + header.file_size - header.data_start
    again = parse_header(Path("x"), prefix, size)
    assert [(i.name, i.dtype, i.shape) for i in again.tensors.values()] == entries
    assert again.metadata == header.metadata
    for wrong, length in ((prefix[:-1], size), (prefix, size - 1), (prefix, size + 1), (b"", size)):
        with pytest.raises(DamagedError):
            parse_header(Path("x"), wrong, length)


def test_the_same_tensors_need_no_new_file(tmp_path: Path) -> None:
    for build in (single, sharded):
        source = Checkpoint.open(build(tmp_path / build.__name__))
        layout = rearrange(source, list(reversed(slots(source))))
        assert (layout.files, layout.removed, layout.index) == ({}, frozenset(), None)
        assert layout.tensors == Layout.of(source).tensors


def test_order_of_the_list_does_not_matter(tmp_path: Path) -> None:
    source = Checkpoint.open(sharded(tmp_path / "base"))
    wanted = slots(source, *(new(f"a.{number}.x") for number in (10, 9, 2)), new("b.y"), without=("a.f32",))
    one, two = rearrange(source, wanted), rearrange(source, wanted[::-1])
    assert one == two
    # No block of that number is there, and so the last file takes them, by number.
    added = [slot.name for slot in one.files[SECOND].slots if slot.place is None]
    assert added == ["a.2.x", "a.9.x", "a.10.x", "b.y"]


@pytest.mark.usefixtures("no_reflink")
@pytest.mark.parametrize("link", [False, True])
def test_only_the_file_that_changes_is_written(link: bool, tmp_path: Path) -> None:
    source = Checkpoint.open(sharded(tmp_path / "base"))
    (tmp_path / "base" / FIRST).chmod(0o604)
    before = snapshot(source.root)
    out = publish(
        source, tmp_path / "out", rearrange(source, slots(source, new("a.new"), without=("a.f32",))), link=link
    )
    assert snapshot(source.root) == before
    assert (out.root / SECOND).samefile(source.root / SECOND) == link
    assert (out.root / SECOND).read_bytes() == (source.root / SECOND).read_bytes()
    assert (out.root / FIRST).stat().st_mode & 0o777 == 0o604
    old, found = (load_file(root / FIRST) for root in (source.root, out.root))
    assert found.pop("a.new").tolist() == [0, 1, 2]
    del old["a.f32"]
    assert found.keys() == old.keys()
    assert all(found[name].equal(tensor) for name, tensor in old.items())
    index = json.loads((out.root / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["a.new"] == FIRST
    assert "a.f32" not in index["weight_map"]
    assert index["metadata"]["total_size"] == out.nbytes


def test_other_weight_files_are_left_out(tmp_path: Path) -> None:
    source = Checkpoint.open(sharded(tmp_path / "base"))
    out = publish(source, tmp_path / "out", rearrange(source, [s for s in slots(source) if s.name.startswith("b.")]))
    assert not (out.root / FIRST).exists()
    assert set(out.tensors) == {name for name in source.tensors if name.startswith("b.")}


def test_rows_of_new_tensors_are_checked_and_read_as_zeros_before(tmp_path: Path) -> None:
    source = Checkpoint.open(single(tmp_path / "base"))
    layout = rearrange(source, slots(source, new("a.new"), new("a.other")))
    with Publication(source, tmp_path / "out", rewrite=["a.new"], layout=layout) as publication:
        with pytest.raises(ValueError, match="do not fit"):
            publication.patch_rows("a.new", 1, np.zeros(3, dtype="<f4"))
        with pytest.raises(ValueError, match="not declared"):
            publication.patch_rows("a.other", 0, np.zeros(3, dtype="<f4"))
        publication.publish()
    assert Checkpoint.open(tmp_path / "out").read("a.other").tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="no place"):
        Publication(
            source, tmp_path / "x", rewrite=["a.f32"], layout=rearrange(source, slots(source, without=("a.f32",)))
        )


def test_failures_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint.open(sharded(tmp_path / "base"))
    layout = rearrange(source, slots(source, new("a.new")))
    content = (source.root / FIRST).read_bytes()
    (source.root / FIRST).write_bytes(content[:-20])
    with pytest.raises(DamagedError) as caught:
        publish(source, tmp_path / "out", layout)
    assert caught.value.exit_code == 8
    (source.root / FIRST).write_bytes(content)
    monkeypatch.setattr(os, "pwrite", refuse(errno.ENOSPC))
    with pytest.raises(ResourceError) as full:
        publish(source, tmp_path / "out", layout)
    assert full.value.exit_code == 7
    assert leftovers(tmp_path) == ["base"]
