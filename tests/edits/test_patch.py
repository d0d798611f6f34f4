"""Patches and undo data: exact bytes forward and back, small files, refusals, bounded memory."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from llmsurgery.checkpoint import Checkpoint, Publication, decode, encode, storage_dtype
from llmsurgery.edits.build import write_patch
from llmsurgery.edits.delta import FileDelta
from llmsurgery.edits.kinds import LowRank, Mask, Replace, Sparse, TensorEdit
from llmsurgery.edits.patch import read_patch
from llmsurgery.edits.planes import from_planes, to_planes
from llmsurgery.edits.undo import NAME, read_undo
from llmsurgery.errors import DamagedError, InputError

from .building import apply, checkpoint, content, make_patch, matrix, revert, write

SHAPE = (48, 40)


def edits_of(kind: str, shape: tuple[int, int] = SHAPE) -> list[TensorEdit]:
    rng = np.random.default_rng(7)
    rows, columns = shape
    low_rank = LowRank("w", rng.standard_normal((rows, 2)) * 0.01, rng.standard_normal((2, columns)) * 0.1)
    indices = np.flatnonzero(rng.random(rows * columns) < 0.02)
    return {
        "low rank": [low_rank],
        "two low ranks": [low_rank, LowRank("w", low_rank.u[:, :1], low_rank.v[:1])],
        "replace": [Replace("w", rng.standard_normal(shape))],
        "mask": [Mask("w", rng.random(shape) > 0.5)],
        "sparse": [Sparse("w", indices, rng.standard_normal(indices.size))],
        "low rank, then mask": [low_rank, Mask("w", rng.random(shape) > 0.5)],
    }[kind]


KINDS = ["low rank", "two low ranks", "replace", "mask", "sparse", "low rank, then mask"]


@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_back_are_exact(kind: str, code: str, tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", code, SHAPE)
    result = write(base, tmp_path / "out", edits_of(kind))
    assert content(result) != content(base)
    for number, factors in enumerate((edits_of(kind), [])):
        patch = make_patch(tmp_path / f"patch{number}", base, result, factors)
        assert content(apply(patch, base, tmp_path / f"applied{number}")) == content(result)
    assert content(revert(result, tmp_path / "reverted")) == content(base)


def test_mask_zeroes_entries_and_leaves_no_negative_zero(tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "BF16", SHAPE)
    keep = np.random.default_rng(1).random(SHAPE) > 0.3
    result = write(base, tmp_path / "out", [Mask("w", keep)]).read("w")
    assert np.array_equal(result, np.where(keep, base.read("w"), 0))
    assert np.array_equal(result == 0, ~keep)


def test_sparse_sets_entries(tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "F32", SHAPE)
    result = write(base, tmp_path / "out", [Sparse("w", np.array([3, 41, 1919]), np.array([1.0, 2.0, 3.0]))])
    expected = base.read("w").copy()
    expected.reshape(-1)[[3, 41, 1919]] = [1, 2, 3]
    assert np.array_equal(result.read("w"), expected)


def test_vectors_and_scalars_are_patched_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    tensors = {"vector": ("F32", rng.random(9).astype("<f4")), "scalar": ("F32", np.array(1.5, dtype="<f4"))}
    base = checkpoint(tmp_path / "base", tensors)
    edits: list[TensorEdit] = [Replace("vector", rng.random(9)), Replace("scalar", np.array(2.5))]
    result = write(base, tmp_path / "out", edits)
    patch = make_patch(tmp_path / "patch", base, result)
    assert content(apply(patch, base, tmp_path / "applied")) == content(result)
    assert content(revert(result, tmp_path / "reverted")) == content(base)


@pytest.mark.parametrize(("code", "bound"), [("BF16", 1.1), ("F32", 1.2)])
def test_rank_one_patch_is_about_its_factors(code: str, bound: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows, columns = 1536, 1024
    base = matrix(tmp_path / "base", code, (rows, columns))
    single = [(rng.standard_normal(shape) * 0.1).astype(np.float32) for shape in ((rows, 1), (1, columns))]
    result = write(base, tmp_path / "out", [LowRank("w", *single)])
    patch = make_patch(tmp_path / "patch", base, result, [LowRank("w", *single)])
    assert patch.nbytes < bound * 4 * (rows + columns) + 1000
    assert content(apply(patch, base, tmp_path / "applied")) == content(result)
    # Factors that need float64 keep it.
    double = LowRank("w", rng.standard_normal((rows, 1)), rng.standard_normal((1, columns)))
    exact = make_patch(tmp_path / "double", base, write(base, tmp_path / "double-out", [double]), [double])
    assert exact.parts["w#0.u"].dtype == "F64"


@pytest.mark.parametrize(
    ("share", "encoding"), [(0.001, "gaps"), (0.3, "bits"), (0.999, "dense")], ids=["few", "many", "nearly all"]
)
def test_the_smallest_form_is_written(share: float, encoding: str, tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "BF16", (256, 256))
    touched = np.random.default_rng(4).random((256, 256)) < share
    values = np.where(touched, 1.0, decode(base.read("w"), "BF16"))
    result = write(base, tmp_path / "out", [Replace("w", values)])
    patch = make_patch(tmp_path / "patch", base, result)
    exact = patch.tensors["w"].exact
    assert exact is not None
    assert exact.encoding == encoding
    count = int(np.count_nonzero(base.read("w") != result.read("w")))
    positions = {"gaps": 3 * count, "bits": 256 * 256 // 8, "dense": 0}[encoding]
    values_bytes = 2 * (256 * 256 if encoding == "dense" else count)
    assert patch.nbytes < 1.1 * (positions + values_bytes) + 1000


def test_changed_rows_are_runs_and_a_mask_is_bits_without_values(tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "BF16", (256, 256))
    values = decode(base.read("w"), "BF16")
    values[40:48] += 1
    rows = make_patch(tmp_path / "rows", base, write(base, tmp_path / "out", [Replace("w", values)])).tensors["w"].exact
    assert rows is not None
    assert rows.encoding == "runs"
    keep = np.random.default_rng(4).random((256, 256)) > 0.5
    masked = make_patch(tmp_path / "mask", base, write(base, tmp_path / "masked", [Mask("w", keep)]))
    exact = masked.tensors["w"].exact
    assert exact is not None
    assert (exact.encoding, exact.values) == ("bits", None)
    assert masked.nbytes < 256 * 256 // 8 + 1000


def test_entries_at_a_rounding_boundary_are_listed(tmp_path: Path) -> None:
    # 1 + 2^-8 is exactly half way between two BF16 values.
    base = checkpoint(tmp_path / "base", {"w": ("BF16", encode(np.ones((64, 64)), "BF16"))})
    u, v = np.full((64, 1), 0.3), np.full((1, 64), 0.1)
    u[5, 0], v[0, 7] = 1.0, 2.0**-8
    u[6, 0] = 1.0 + 1e-14
    result = write(base, tmp_path / "out", [LowRank("w", u, v)])
    patch = make_patch(tmp_path / "patch", base, result, [LowRank("w", u, v)])
    tensor = patch.tensors["w"]
    assert tensor.factors
    assert tensor.exact is not None
    assert tensor.exact.values is not None
    assert patch.parts[tensor.exact.values].shape == (2,)
    assert content(apply(patch, base, tmp_path / "applied")) == content(result)


def test_wrong_factors_are_found_out(tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "BF16", (128, 128))
    rng = np.random.default_rng(9)
    true = LowRank("w", rng.standard_normal((128, 1)), rng.standard_normal((1, 128)))
    result = write(base, tmp_path / "out", [true])
    patch = make_patch(tmp_path / "patch", base, result, [LowRank("w", true.u, -true.v)])
    assert not patch.tensors["w"].factors
    assert content(apply(patch, base, tmp_path / "applied")) == content(result)


def test_another_base_is_refused_by_name(tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "F32", SHAPE)
    patch = make_patch(tmp_path / "patch", base, write(base, tmp_path / "out", edits_of("low rank")))
    with pytest.raises(InputError, match="'w' differs"):
        apply(patch, matrix(tmp_path / "seed", "F32", SHAPE, seed=1), tmp_path / "x")
    with pytest.raises(InputError, match="'w' is F16"):
        apply(patch, matrix(tmp_path / "dtype", "F16", SHAPE), tmp_path / "x")
    with pytest.raises(InputError, match="'w' is not in it"):
        apply(patch, checkpoint(tmp_path / "name", {"v": ("F32", base.read("w"))}), tmp_path / "x")
    (base.root / "config.json").write_text('{"model_type": "changed"}')
    with pytest.raises(InputError, match=r"config\.json differs"):
        apply(patch, base, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_every_flipped_byte_of_a_patch_is_found(tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "BF16", SHAPE)
    path = tmp_path / "patch"
    make_patch(path, base, write(base, tmp_path / "out", edits_of("low rank")))
    original = path.read_bytes()
    for position in range(0, len(original), 7):
        damaged = bytearray(original)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            read_patch(path)
    path.write_bytes(original[:-3])
    with pytest.raises(DamagedError):
        read_patch(path)


def test_what_is_no_patch_is_refused(tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "BF16", SHAPE)
    for path in (tmp_path / "missing", base.root, base.root / "model.safetensors"):
        with pytest.raises(InputError):
            read_patch(path)


def test_a_patch_adds_tensors_in_a_folder_and_never_replaces_weights(tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "F32", SHAPE)
    result = write(base, tmp_path / "out", edits_of("low rank"))
    path = result.root / "extra" / "more.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"tensors of a bundle's own code")
    patch = make_patch(tmp_path / "patch", base, Checkpoint.open(result.root))
    applied = apply(patch, base, tmp_path / "applied")
    assert (applied.root / "extra" / "more.safetensors").read_bytes() == path.read_bytes()
    # The same tensors, stored under the very name that the patch would add.
    other = tmp_path / "other"
    (other / "extra").mkdir(parents=True)
    (base.root / "model.safetensors").rename(other / "extra" / "more.safetensors")
    (base.root / "config.json").rename(other / "config.json")
    placed = {"weight_map": dict.fromkeys(base.tensors, "extra/more.safetensors")}
    (other / "model.safetensors.index.json").write_text(json.dumps(placed))
    with pytest.raises(InputError, match="holds weights of it"):
        apply(patch, Checkpoint.open(other), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["more.safetensors", "extra/model.safetensors.index.json", "extra/more.bin"])
def test_a_patch_adds_nothing_that_could_be_taken_for_weights(name: str, tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "F32", SHAPE)
    result = write(base, tmp_path / "out", edits_of("low rank"))
    path = result.root / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"{}")
    with (tmp_path / "patch").open("wb") as stream:
        change = FileDelta(name, None, hashlib.sha256(b"{}").hexdigest())
        write_patch(stream, base, result, [], {}, [change], {})
    with pytest.raises(DamagedError, match="may not change"):
        read_patch(tmp_path / "patch")


@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64", "U8", "I64", "BOOL"])
def test_any_bytes_come_back_from_undo_data(code: str) -> None:
    rng = np.random.default_rng(0)
    kind = storage_dtype(code)
    # Every bit pattern, NaN payloads and negative zeros included.
    old, new = (np.frombuffer(rng.bytes(4000 * kind.itemsize), dtype=kind).reshape(40, 100) for _ in range(2))
    restored = from_planes(to_planes(old, new), new)
    assert restored.tobytes() == old.tobytes()
    assert restored.dtype == old.dtype


def test_undo_data_of_a_small_change_are_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = matrix(tmp_path / "base", "BF16", (512, 512))
    edit = LowRank("w", rng.standard_normal((512, 4)) * 5e-5, rng.standard_normal((4, 512)))
    result = write(base, tmp_path / "out", [edit])
    assert (result.root / NAME).stat().st_size < 0.35 * base.info("w").nbytes
    assert not (write(base, tmp_path / "none", [edit], undo=False).root / NAME).exists()


def test_damaged_undo_data_and_changed_results_are_refused(tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "BF16", SHAPE)
    result = write(base, tmp_path / "out", edits_of("low rank"))
    path = result.root / NAME
    original = path.read_bytes()
    for position in range(0, len(original), 5):
        damaged = bytearray(original)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            revert(result, tmp_path / "reverted")
        assert not (tmp_path / "reverted").exists()
    for length in (0, 10, len(original) - 1):
        path.write_bytes(original[:length])
        with pytest.raises(DamagedError):
            read_undo(result.root)
    path.write_bytes(original)
    weights = result.root / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-3] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(DamagedError, match="was changed after it was written"):
        revert(Checkpoint.open(result.root), tmp_path / "reverted")


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns, allowed = 8192, 1024, 6 << 20
    original = Checkpoint.row_blocks
    monkeypatch.setattr(Checkpoint, "row_blocks", lambda self, name, size=1 << 16: original(self, name, size))
    base = matrix(tmp_path / "base", "F32", (rows, columns))
    assert base.nbytes > 5 * allowed
    edit = LowRank("w", np.full((rows, 1), 0.01), np.ones((1, columns)))
    with Publication(base, tmp_path / "other", rewrite={"w"}) as publication:
        for start, stop in base.row_blocks("w"):
            publication.patch_rows("w", start, base.read("w", start, stop) * np.float32(1.5))
        publication.publish()
    steps = {
        "write": lambda: write(base, tmp_path / "out", [edit]),
        "factors": lambda: make_patch(tmp_path / "small", base, Checkpoint.open(tmp_path / "out"), [edit]),
        "dense": lambda: make_patch(tmp_path / "dense", base, Checkpoint.open(tmp_path / "other")),
        "apply": lambda: apply(read_patch(tmp_path / "dense"), base, tmp_path / "applied"),
        "revert": lambda: revert(Checkpoint.open(tmp_path / "out"), tmp_path / "reverted"),
    }
    for name, step in steps.items():
        tracemalloc.start()
        step()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # The container's digest is computed through one buffer of 4 MiB.
        assert peak < allowed, f"{name}: {peak}"
