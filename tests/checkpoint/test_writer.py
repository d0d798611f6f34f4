from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmsurgery.checkpoint import Checkpoint, Publication, read_header
from llmsurgery.errors import DamagedError, ResourceError

from .builders import random_tensors, sharded, single, snapshot, write_index, write_safetensors
from .publishing import FIRST, SECOND, leftovers, publish_patch, refuse

pytestmark = pytest.mark.usefixtures("no_reflink")


@pytest.mark.parametrize("build", [single, sharded])
@pytest.mark.parametrize("link", [False, True])
def test_only_the_patched_rows_differ(tmp_path: Path, build: Callable[[Path], Path], link: bool) -> None:
    root = build(tmp_path / "m")
    before = snapshot(root)
    checkpoint = Checkpoint.open(root)
    publish_patch(checkpoint, tmp_path / "out", "a.bf16", link=link)
    assert snapshot(root) == before
    assert leftovers(tmp_path) == ["m", "out"]
    result = Checkpoint.open(tmp_path / "out")
    assert list(result.tensors) == list(checkpoint.tensors)
    for name in checkpoint.tensors:
        expected = checkpoint.read(name)
        if name == "a.bf16":
            expected[2:5] ^= 1
        assert result.read(name).tobytes() == expected.tobytes()
    # Everything but the one file is the same to the bit and to the mode, and no file differs in length.
    changed = {file for file, entry in snapshot(tmp_path / "out").items() if entry[2] != before[file][2]}
    assert changed == {checkpoint.file_of("a.bf16")}
    modes = {file: entry[0] for file, entry in snapshot(tmp_path / "out").items()}
    assert modes == {file: entry[0] for file, entry in before.items()}


def test_the_library_reads_the_result(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    root = single(tmp_path / "m")
    write_safetensors(root / "model.safetensors", {"w": ("F32", np.ones((4, 2), "<f4"))})
    with Publication(Checkpoint.open(root), tmp_path / "out", rewrite=["w"]) as publication:
        publication.patch_rows("w", 1, np.full((2, 2), 3, "<f4"))
        publication.publish()
    loaded = library.load_file(tmp_path / "out" / "model.safetensors")["w"]
    np.testing.assert_array_equal(loaded[:, 0], [1, 3, 3, 1])


def test_link_mode_shares_untouched_files_and_never_writes_through(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    before = snapshot(root)
    with Publication(Checkpoint.open(root), tmp_path / "out", link=True, rewrite=["a.bf16"]) as publication:
        publication.patch_rows("a.bf16", 0, np.zeros((8, 5), "<u2"))
        publication.write_file("README.md", b"# new card\n")
        publication.write_file("config.json", b"{}")
        publication.publish()
    out = tmp_path / "out"
    assert publication.methods[FIRST] == "copy"
    assert publication.methods[SECOND] == "link"
    assert (out / SECOND).samefile(root / SECOND)
    assert not (out / FIRST).samefile(root / FIRST)
    assert (out / "README.md").read_bytes() == b"# new card\n"
    assert (out / "config.json").stat().st_mode & 0o777 == 0o600
    assert publication.bytes_written == (root / FIRST).stat().st_size + 80 + len(b"# new card\n") + 2
    assert snapshot(root) == before


def test_link_that_falls_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EXDEV))
    publication = publish_patch(Checkpoint.open(sharded(tmp_path / "m")), tmp_path / "out", "a.bf16", link=True)
    assert set(publication.methods.values()) == {"copy"}
    assert any("hard links are not possible" in notice for notice in publication.notices)


def test_a_file_with_two_names_is_never_patched(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    with Publication(checkpoint, tmp_path / "out", rewrite=["a.bf16"]) as publication:
        os.link(publication.path / "model.safetensors", tmp_path / "second name")
        with pytest.raises(ResourceError, match="2 names"):
            publication.patch_rows("a.bf16", 0, checkpoint.read("a.bf16"))


def test_hub_cache_layout(tmp_path: Path) -> None:
    real = sharded(tmp_path / "blobs")
    root = tmp_path / "snapshots" / "main"
    root.mkdir(parents=True)
    for path in real.iterdir():
        if path.is_file():
            (root / path.name).symlink_to(Path("../../blobs") / path.name)
    before = snapshot(tmp_path)
    publish_patch(Checkpoint.open(root), tmp_path / "out", "b.bf16", link=True)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    shutil.rmtree(tmp_path / "out")
    after = snapshot(tmp_path)
    assert {k: v for k, v in after.items() if k != "."} == {k: v for k, v in before.items() if k != "."}


def test_side_files_are_carried_and_stale_weights_are_not(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    stale = ["pytorch_model.bin", "old.pt", "x.pth", "m.GGUF", "flax.msgpack", "tf.h5", "onnx/model.onnx"]
    stale += ["pytorch_model.bin.index.json", "consolidated.safetensors", "model-00001-of-00002.safetensors"]
    stale += ["model.safetensors.index.json"]
    private = [
        ".git/config",
        ".cache/x",
        ".llmsurgery/undo",
        "surgery.json",
        "report.html",
        "m.report.json",
        "a.partial",
    ]
    kept = [
        "LICENSE",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "adapter_model.safetensors",
        ".gitattributes",
    ]
    for name in [*stale, *private, *kept]:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(name.encode())
    (root / "other.partial").mkdir()
    os.mkfifo(root / "pipe")
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to(".")
    (root / "out of here").symlink_to(tmp_path)
    (root / "alias").symlink_to("1_Pooling")
    with Publication(Checkpoint.open(root), tmp_path / "out") as publication:
        publication.publish()
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    own = {"config.json", "tokenizer.json", "README.md", "assets/template.jinja", "model.safetensors"}
    assert found == own | set(kept) | {"alias/config.json"}
    assert not (tmp_path / "out" / "onnx").exists()
    assert sorted(publication.skipped) == sorted(stale)
    told = " ".join(publication.notices)
    for name in ("pipe", "dangling", "loop", "out of here", "stale"):
        assert name in told


def test_a_shard_with_an_unusual_name_is_never_left_out(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    (root / ".cache").mkdir()
    (root / "model.safetensors").rename(root / ".cache" / "weights.bin")
    write_index(root, {"a.bf16": ".cache/weights.bin"})
    publish_patch(Checkpoint.open(root), tmp_path / "out", "a.bf16")
    assert "a.bf16" in Checkpoint.open(tmp_path / "out").tensors


def test_folder_and_file_modes_are_kept(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    (root / "assets" / "template.jinja").chmod(0o755)
    (root / "assets").chmod(0o555)
    root.chmod(0o555)
    with Publication(Checkpoint.open(root), tmp_path / "out") as publication:
        assert publication.path.stat().st_mode & 0o777 == 0o700
        publication.write_file("new/folder/file", b"1")
        publication.write_file("tokenizer.json", b"{ }")
        publication.publish()
    out = tmp_path / "out"
    modes = {file: entry[0] for file, entry in snapshot(out).items() if not file.startswith("new")}
    assert modes == {file: entry[0] for file, entry in snapshot(root).items()}
    with Publication(Checkpoint.open(root), out, force=True) as publication:
        publication.publish()
    assert not (out / "new").exists()
    assert leftovers(tmp_path) == ["m", "out"]


def test_patches_of_every_kind_of_tensor(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    names = list(random_tensors("a"))
    with Publication(checkpoint, tmp_path / "out", rewrite=names) as publication:
        copied = publication.bytes_written
        for name in names:
            raw = checkpoint.read(name)
            raw.reshape(-1).view(np.uint8)[...] ^= 0x55
            if raw.ndim == 3:
                publication.patch_rows(name, 0, np.asfortranarray(raw[:1]))
                publication.patch_rows(name, 1, raw[1:])
            else:
                publication.patch_rows(name, 0, raw)
        assert publication.bytes_written - copied == checkpoint.nbytes
        publication.publish()
    result = Checkpoint.open(tmp_path / "out")
    for name in names:
        wanted = bytes(byte ^ 0x55 for byte in checkpoint.read(name).tobytes())
        assert result.read(name).tobytes() == wanted
    info = result.info("a.bf16")
    header = (tmp_path / "out" / "model.safetensors").read_bytes()[: read_header(info.path).data_start]
    assert (tmp_path / "m" / "model.safetensors").read_bytes().startswith(header)


def test_patches_that_do_not_fit_are_bugs(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    with Publication(checkpoint, tmp_path / "out", rewrite=["a.bf16", "a.scalar"]) as publication:
        good = checkpoint.read("a.bf16")
        for start, raw in ((1, good), (-1, good[:1]), (8, good[:1]), (0, good[:, :4]), (0, good.reshape(-1))):
            with pytest.raises(ValueError, match="fit"):
                publication.patch_rows("a.bf16", start, raw)
        with pytest.raises(ValueError, match="stored are"):
            publication.patch_rows("a.bf16", 0, good.astype("<f4"))
        with pytest.raises(ValueError, match="fit"):
            publication.patch_rows("a.scalar", 0, np.zeros(1, "<f4"))
        with pytest.raises(ValueError, match="rewrite"):
            publication.patch_rows("a.f32", 0, checkpoint.read("a.f32"))
        with pytest.raises(DamagedError):
            publication.patch_rows("nope", 0, good)
        publication.patch_rows("a.bf16", 8, good[:0])
        publication.write_file("model.safetensors", b"replaced")
        with pytest.raises(ValueError, match="replaced"):
            publication.patch_rows("a.bf16", 0, good)
    with pytest.raises(ValueError, match="not open"):
        publication.patch_rows("a.bf16", 0, good)


@pytest.mark.parametrize("name", ["", ".", "/x", "../x", "a/../../x", "a\\b", "x\0", "c:x", "a/", "\ud800"])
def test_files_outside_of_the_output(tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    with Publication(checkpoint, tmp_path / "out") as publication:
        before = snapshot(tmp_path)
        with pytest.raises(DamagedError):
            publication.write_file(name, b"x")
        assert snapshot(tmp_path) == before


def test_new_files(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    with Publication(checkpoint, tmp_path / "out") as publication:
        copied = publication.bytes_written
        publication.write_file(".llmsurgery/undo", b"12")
        publication.write_file("surgery.json", b"{}")
        publication.write_file("surgery.json", b"{1}")
        with publication.new_file("big") as stream:
            stream.write(b"abc")
            stream.seek(0)
        assert publication.bytes_written - copied == 10
        with pytest.raises(ResourceError):
            publication.write_file("README.md/below a file", b"")
        with pytest.raises(ResourceError):
            publication.write_file("assets", b"")
        half = publication.new_file("surgery.json")
        half.__enter__().write(b"half")
        assert not half.__exit__(RuntimeError, RuntimeError(), None)
        publication.publish()
    out = tmp_path / "out"
    assert (out / "surgery.json").read_bytes() == b"{1}"
    assert (out / "big").read_bytes() == b"abc"
    assert (out / "assets" / "template.jinja").exists()
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
