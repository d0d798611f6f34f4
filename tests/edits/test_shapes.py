"""Edits that add, drop, slice and rename tensors: exact bytes written, patched, applied and reverted."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llmsurgery.checkpoint import Checkpoint, decode, encode
from llmsurgery.checkpoint.container import Part, read_container, write_container
from llmsurgery.edits.arrange import arrange
from llmsurgery.edits.kinds import Add, Drop, LowRank, Mask, Rename, Replace, Slice, Sparse, StoredEdit
from llmsurgery.edits.patch import read_patch
from llmsurgery.edits.patch_entries import KEY
from llmsurgery.edits.undo import read_undo
from llmsurgery.edits.write import TensorChange, write_edits
from llmsurgery.errors import DamagedError, DivergedError, InputError, NoEffectError, SurgeryError

from ..checkpoint.builders import sharded, single, write_safetensors
from .building import apply, checkpoint, make_patch, revert, write
from .reference import expected

RECORDS = ("README.md", ".llmsurgery")


def files(root: Path) -> dict[str, tuple[bytes, int]]:
    """Content and mode of every file that makes the model."""
    found = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {
        name: (path.read_bytes(), path.stat().st_mode & 0o777)
        for name, path in found.items()
        if not name.startswith(RECORDS)
    }


def model(root: Path, code: str = "BF16", shards: bool = False) -> Checkpoint:
    """Three blocks of two matrices and a norm, in one file or one file for each block, with a bias of bytes."""
    rng = np.random.default_rng(3)

    def block(number: int) -> dict[str, tuple[str, np.ndarray]]:
        return {
            f"model.layers.{number}.up.weight": (code, encode(rng.standard_normal((12, 7)), code)),
            f"model.layers.{number}.down.weight": (code, encode(rng.standard_normal((7, 12)), code)),
            f"model.layers.{number}.norm.weight": (code, encode(rng.standard_normal(7), code)),
        }

    root.mkdir()
    (root / "config.json").write_text('{"model_type": "other"}')
    embed = {"model.embed.weight": (code, encode(rng.standard_normal((9, 7)), code))}
    if not shards:
        tensors = {**embed, **block(0), **block(1), **block(2)}
        write_safetensors(root / "model.safetensors", tensors, {"format": "pt", "note": "kept"}).chmod(0o640)
        return Checkpoint.open(root)
    weight_map = {}
    for number, tensors in enumerate(({**embed, **block(0)}, block(1), block(2))):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        write_safetensors(root / file, tensors, {"format": "pt"}).chmod(0o640)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 1, "note": "kept"}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return Checkpoint.open(root)


UP, DOWN, NORM = ("model.layers.{}.up.weight", "model.layers.{}.down.weight", "model.layers.{}.norm.weight")
KEEP = np.array([0, 2, 3, 7, 11])


def low_rank(name: str, rows: int, columns: int) -> LowRank:
    rng = np.random.default_rng(8)
    return LowRank(name, rng.standard_normal((rows, 2)) * 0.1, rng.standard_normal((2, columns)) * 0.1)


def without_block(number: int, last: int) -> list[StoredEdit]:
    drops: list[StoredEdit] = [Drop(pattern.format(number)) for pattern in (UP, DOWN, NORM)]
    return drops + [
        Rename(pattern.format(block), pattern.format(block - 1))
        for block in range(number + 1, last + 1)
        for pattern in (UP, DOWN, NORM)
    ]


CASES: dict[str, list[StoredEdit]] = {
    "add": [Add("model.layers.1.up.bias", np.arange(12.0)), Add("head.bias", np.ones(9), "F32")],
    "add zeros": [Add("model.layers.0.down.bias", np.zeros(7))],
    "add, then change": [Add("x", np.ones((4, 3))), low_rank("x", 4, 3), Slice("x", 0, np.array([1, 3]))],
    "drop": [Drop(NORM.format(1)), Drop(UP.format(0))],
    "drop a whole file": [Drop(pattern.format(1)) for pattern in (UP, DOWN, NORM)],
    "slice rows": [Slice(UP.format(1), 0, KEEP)],
    "slice columns": [Slice(DOWN.format(1), 1, KEEP)],
    "slice both": [Slice(UP.format(1), 0, KEEP), Slice(UP.format(1), 1, np.array([1, 6]))],
    "slice twice": [Slice(UP.format(1), 0, KEEP), Slice(UP.format(1), 0, np.array([0, 3]))],
    "slice vector": [Slice(NORM.format(2), 0, np.array([0, 6]))],
    "slice, then change": [Slice(UP.format(1), 0, KEEP), low_rank(UP.format(1), 5, 7)],
    "change, then slice": [low_rank(UP.format(1), 12, 7), Slice(UP.format(1), 0, KEEP)],
    "change, slice, change": [
        low_rank(UP.format(1), 12, 7), Slice(UP.format(1), 1, np.array([0, 5])),
        Sparse(UP.format(1), np.array([0, 23]), np.array([3.0, 4.0])), Mask(UP.format(1), np.tri(12, 2, dtype=bool)),
    ],
    "rename": [Rename(UP.format(0), "model.other"), Rename(NORM.format(2), "a")],
    "rename, then change": [Rename(UP.format(0), "y"), low_rank("y", 12, 7), Slice("y", 1, np.array([2, 3, 4]))],
    "swap": [Rename(UP.format(0), "t"), Rename(UP.format(2), UP.format(0)), Rename("t", UP.format(2))],
    "replace by another shape": [Drop(UP.format(1)), Add(UP.format(1), np.ones((2, 2)), "F32")],
    "drop block": without_block(0, 2),
    "in place beside": [low_rank(UP.format(0), 12, 7), Drop(NORM.format(0)), Replace(NORM.format(2), np.ones(7))],
}  # fmt: skip


def stored(found: Checkpoint) -> dict[str, tuple[str, bytes, tuple[int, ...]]]:
    return {name: (info.dtype, found.read(name).tobytes(), info.shape) for name, info in found.tensors.items()}


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_back_are_exact(case: str, shards: bool, tmp_path: Path) -> None:
    base, edits = model(tmp_path / "base", shards=shards), CASES[case]
    before = files(base.root)
    result = write(base, tmp_path / "out", edits, link=True)
    assert stored(result) == {n: (c, raw.tobytes(), raw.shape) for n, (c, raw) in expected(base, edits).items()}
    for number, known in enumerate((edits, [])):
        patch = make_patch(tmp_path / f"patch{number}", base, result, known)
        applied = apply(patch, base, tmp_path / f"applied{number}")
        if known:
            assert files(applied.root) == files(result.root)
        assert stored(applied) == stored(result)
    reverted = revert(result, tmp_path / "reverted")
    assert files(reverted.root) == before
    assert files(base.root) == before, "the source changed"


@pytest.mark.parametrize("code", ["F32", "F16", "F64"])
def test_other_dtypes_of_the_checkpoint(code: str, tmp_path: Path) -> None:
    base = model(tmp_path / "base", code)
    edits = [*CASES["change, slice, change"], *CASES["add"]]
    result = write(base, tmp_path / "out", edits)
    assert result.info("model.layers.1.up.bias").dtype == code
    assert stored(result) == {n: (c, raw.tobytes(), raw.shape) for n, (c, raw) in expected(base, edits).items()}
    applied = apply(make_patch(tmp_path / "patch", base, result, edits), base, tmp_path / "applied")
    assert files(applied.root) == files(result.root)
    assert files(revert(result, tmp_path / "reverted").root) == files(base.root)


def test_shards_that_stay_are_links_and_the_index_follows(tmp_path: Path) -> None:
    base = model(tmp_path / "base", shards=True)
    result = write(base, tmp_path / "out", CASES["add"][:1], link=True)
    names = sorted(base.headers)
    assert [(result.root / name).samefile(base.root / name) for name in names] == [True, False, True]
    # Behind its neighbour in the same file; everything else keeps its order and the header its metadata.
    assert list(result.headers[names[1]].tensors) == [
        UP.format(1), "model.layers.1.up.bias", DOWN.format(1), NORM.format(1)
    ]  # fmt: skip
    assert result.headers[names[1]].metadata == {"format": "pt"}
    text = (result.root / "model.safetensors.index.json").read_text()
    index = json.loads(text)
    assert index["metadata"] == {"total_size": result.nbytes, "note": "kept"}
    assert index["weight_map"]["model.layers.1.up.bias"] == names[1]
    assert text == json.dumps(index, indent=2, sort_keys=True) + "\n"
    gone = write(base, tmp_path / "gone", CASES["drop a whole file"])
    assert sorted(gone.headers) == [names[0], names[2]]
    assert not (gone.root / names[1]).exists()
    assert set(json.loads((gone.root / "model.safetensors.index.json").read_text())["weight_map"]) == set(gone.tensors)


def test_what_has_no_neighbour_goes_into_the_last_file(tmp_path: Path) -> None:
    base = model(tmp_path / "base", shards=True)
    result = write(base, tmp_path / "out", [Add("model.layers.9.x", np.ones(2)), Add("z", np.ones(2))])
    assert [result.file_of(name) for name in ("model.layers.9.x", "z")] == [max(base.headers)] * 2


def test_tensors_stay_where_loaders_can_look_at_them(tmp_path: Path) -> None:
    base = single(tmp_path / "base")
    checkpoint = Checkpoint.open(base)
    edits: list[StoredEdit] = [Slice("a.f16", 0, np.array([0, 1, 2])), Add("a.odd", np.ones(3)), Drop("a.mask")]
    result = write(checkpoint, tmp_path / "out", edits)
    for info in result.tensors.values():
        assert info.start % {"F64": 8, "F32": 4}.get(info.dtype, 2) == 0, info
    assert files(revert(result, tmp_path / "reverted").root) == files(base)


def test_bytes_and_scalars_pass_untouched(tmp_path: Path) -> None:
    base = Checkpoint.open(sharded(tmp_path / "base"))
    edits: list[StoredEdit] = [
        Slice("a.mask", 0, np.array([1])), Rename("b.scalar", "c.scalar"), Drop("a.scalar"),
        Slice("b.f64", 2, np.array([0, 3])), Slice("b.f64", 1, np.array([1])), Slice("b.f64", 0, np.array([1])),
    ]  # fmt: skip
    result = write(base, tmp_path / "out", edits)
    assert result.read("a.mask").tolist() == [1]
    assert np.array_equal(result.read("b.f64"), base.read("b.f64")[1:, 1:2, [0, 3]])
    assert files(revert(result, tmp_path / "reverted").root) == files(base.root)
    applied = apply(make_patch(tmp_path / "patch", base, result, edits), base, tmp_path / "applied")
    assert files(applied.root) == files(result.root)


def record(base: Checkpoint, edits: list[StoredEdit]) -> dict[str, TensorChange]:
    return {change.name: change for change in write_edits(base, None, edits, lambda name: "other")}


def test_records_have_digests_by_name(tmp_path: Path) -> None:
    base = model(tmp_path / "base")

    def digest(name: str) -> str:
        return hashlib.sha256(base.read(name).tobytes()).hexdigest()

    changes = record(base, without_block(1, 2))
    first, second = changes[UP.format(1)], changes[UP.format(2)]
    assert (first.sha256_before, first.sha256_after, first.source) == (
        digest(UP.format(1)),
        digest(UP.format(2)),
        UP.format(2),
    )
    assert (second.sha256_before, second.sha256_after, second.changed) == (digest(UP.format(2)), None, True)
    added = record(base, [Add("x", np.zeros(3))])["x"]
    assert (added.sha256_before, added.entries_changed, added.changed) == (None, 3, True)
    sliced = record(base, [Slice(UP.format(0), 0, KEEP)])[UP.format(0)]
    assert (sliced.shape, sliced.shape_before, sliced.entries_changed) == ((5, 7), (12, 7), 49)
    values = decode(base.read(UP.format(0)), "BF16").astype(np.float64)
    cut = np.delete(values, KEEP, axis=0)
    assert sliced.norm_change == pytest.approx(np.linalg.norm(cut) / np.linalg.norm(values))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([Add(UP.format(0), np.ones(1))], "is there already"),
        ([Add("x", np.ones(1)), Add("x", np.ones(1))], "is there already"),
        ([Drop(UP.format(0)), Drop(UP.format(0))], "earlier edit dropped or renamed"),
        ([Drop(UP.format(0)), Slice(UP.format(0), 0, KEEP)], "earlier edit dropped or renamed"),
        ([Rename(UP.format(0), UP.format(1))], "is there already"),
        ([Rename(UP.format(0), "x"), low_rank(UP.format(0), 12, 7)], "earlier edit dropped or renamed"),
        ([Slice(UP.format(0), 2, KEEP)], "axis 2"),
        ([Slice(UP.format(0), -1, KEEP)], "axis -1"),
        ([Slice(UP.format(0), 1, KEEP)], "indices below 7"),
        ([Slice(UP.format(0), 0, np.array([3, 3]))], "ascending"),
        ([Slice(UP.format(0), 0, np.array([], dtype=np.int64))], "indices below 12"),
        ([Slice(UP.format(0), 0, KEEP), low_rank(UP.format(0), 12, 7)], "does not fit"),
        ([Add("x", np.ones(1), "I32")], "in dtype I32"),
    ],
)
def test_edits_that_make_no_sense_are_bugs_of_the_method(
    edits: list[StoredEdit], message: str, tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(SurgeryError, match=message) as caught:
        arrange(model(tmp_path / "base"), edits)
    assert caught.value.exit_code == 1


def test_dropping_everything_and_nothing(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    with pytest.raises(SurgeryError, match="no tensor"):
        arrange(base, [Drop(name) for name in base.tensors])
    with pytest.raises(NoEffectError):
        write_edits(base, None, [Slice(UP.format(0), 0, np.arange(12))], lambda name: "other")
    with pytest.raises(DamagedError, match="missing"):
        arrange(base, [Drop("nothing")])
    for bad in (np.inf, np.nan):
        with pytest.raises(DivergedError):
            write_edits(base, None, [Add("x", np.array([bad]))], lambda name: "other")
    with pytest.raises(DivergedError, match="overflows"):
        write_edits(base, None, [Add("x", np.array([1e39]))], lambda name: "other")


def test_patches_are_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ("m.layers.0.up", "m.layers.0.gate")
    base = checkpoint(tmp_path / "base", {n: ("BF16", encode(rng.standard_normal((512, 300)), "BF16")) for n in names})
    keep = np.flatnonzero(rng.random(512) < 0.7)
    edits: list[StoredEdit] = [
        edit for name in names for edit in (Slice(name, 0, keep), Add(name + "_bias", np.zeros(512)))
    ]
    edits += [LowRank(names[0], rng.standard_normal((keep.size, 1)), rng.standard_normal((1, 300)))]
    result = write(base, tmp_path / "out", edits)
    patch = make_patch(tmp_path / "patch", base, result, edits)
    # Twice the same bits of what is kept are one part; zeros are none.
    assert sum(name.startswith("keep#") for name in patch.parts) == 1
    assert patch.nbytes < 8 * (keep.size + 300) + 4000
    applied = apply(patch, base, tmp_path / "applied")
    assert files(applied.root) == files(result.root)
    # What a slice cut off is all that the way back has to hold.
    sliced = write(base, tmp_path / "sliced", [Slice(names[0], 0, keep)])
    assert (sliced.root / ".llmsurgery/undo.bin").stat().st_size < 1.1 * 600 * (512 - keep.size) + 4000


def test_other_bases_are_refused(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    result = write(base, tmp_path / "out", [*without_block(0, 2), Add("x", np.ones(2)), Slice(UP.format(0), 0, KEEP)])
    edits: list[StoredEdit] = [*without_block(0, 2), Add("x", np.ones(2)), Slice(UP.format(0), 0, KEEP)]
    patch = make_patch(tmp_path / "patch", base, result, edits)
    changes: list[list[StoredEdit]] = [
        [Add("x", np.ones(2))],  # what is to be added is there
        [Drop(UP.format(1))],  # what is to be moved is not
        [Drop(NORM.format(0))],  # what is to be dropped is not
        [Replace(NORM.format(0), np.ones(7))],  # what is to be dropped is another
        [Slice(UP.format(1), 0, np.arange(11))],  # what is to be sliced has another shape
    ]
    for number, change in enumerate(changes):
        other = write(base, tmp_path / f"other{number}", change)
        with pytest.raises(InputError, match="another base") as caught:
            apply(patch, other, tmp_path / "x")
        assert caught.value.exit_code == 3
        assert not (tmp_path / "x").exists()


def test_changed_results_are_not_reverted(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    for number, edits in enumerate((CASES["slice both"], CASES["rename"], CASES["drop"])):
        result = write(base, tmp_path / f"out{number}", edits)
        undo = read_undo(result.root)
        for name in sorted(now for source in undo.tensors if (now := undo.now(source)) is not None):
            info = result.info(name)
            content = bytearray(info.path.read_bytes())
            content[info.end - 1] ^= 1
            kept = info.path.read_bytes()
            info.path.write_bytes(content)
            with pytest.raises(DamagedError, match="changed after it was written"):
                revert(result, tmp_path / "x")
            info.path.write_bytes(kept)
        assert not (tmp_path / "x").exists()


def test_inconsistent_patches_are_damaged(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    edits: list[StoredEdit] = [Slice(UP.format(0), 0, KEEP), Rename(NORM.format(0), "n"), Drop(NORM.format(1))]
    patch = make_patch(tmp_path / "patch", base, write(base, tmp_path / "out", edits), edits)
    document = json.loads(read_container(patch.path).metadata[KEY])
    entry = document["tensors"][UP.format(0)]
    part = entry["keep"]["0"]

    def sealed(bits: bytes, **changes: object) -> Path:
        text = json.dumps(document | {"tensors": {**document["tensors"], UP.format(0): {**entry, **changes}}})
        with (tmp_path / "bad").open("wb") as stream:
            write_container(stream, [Part(part, "U8", (len(bits),), partial(iter, [bits]))], {KEY: text})
        return tmp_path / "bad"

    right = np.packbits(np.isin(np.arange(12), KEEP)).tobytes()
    assert read_patch(sealed(right)).moves()
    for bits in (right + b"\0", right[:1], b"\xff\xff", b"\0\0", right[:1] + b"\x1f"):
        with pytest.raises(DamagedError):
            read_patch(sealed(bits)).moves()
    changes: list[dict[str, object]] = [
        {"keep": {"2": part}}, {"keep": {"0": "nothing"}}, {"keep": {}}, {"shape": [5, 6]}, {"base_shape": [12]},
        {"source": None}, {"source": NORM.format(0)}, {"source": NORM.format(1)}, {"shape": [0, 7]},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(DamagedError) as caught:
            read_patch(sealed(right, **change))
        assert caught.value.exit_code == 8


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    rows, columns = 8192, 1024
    big = (np.random.default_rng(0).standard_normal((rows, columns)) * 0.02).astype("<f4")
    base = checkpoint(tmp_path / "base", {"big": ("F32", big), "moved": ("F32", big), "gone": ("F32", big)})
    del big
    edits: list[StoredEdit] = [Slice("big", 0, np.arange(0, rows, 2)), Slice("big", 1, np.arange(columns // 2))]
    edits += [Rename("moved", "m"), Drop("gone")]
    tracemalloc.start()
    result = write(base, tmp_path / "out", edits)
    patch = make_patch(tmp_path / "patch", base, result, edits)
    apply(patch, base, tmp_path / "applied")
    revert(result, tmp_path / "reverted")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20, f"{peak / 2**20:.0f} MiB for {base.nbytes / 2**20:.0f} MiB of weights"
    assert files(tmp_path / "reverted") == files(base.root)
