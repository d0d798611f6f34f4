"""Edits to stored values: summed in float64, rounded once, refused where they do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsurgery.checkpoint import Checkpoint, Publication, TensorInfo, decode, encode
from llmsurgery.edits.coverage import RoleCoverage, coverage
from llmsurgery.edits.evaluate import evaluate_rows, require_fit, tensor_edits
from llmsurgery.edits.kinds import Config, Edit, LowRank, Replace, TensorEdit
from llmsurgery.edits.write import TensorChange, write_edits
from llmsurgery.errors import DamagedError, DivergedError, NoEffectError, SurgeryError

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
UP, DOWN, NORM = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"


def stored(values: np.ndarray, dtype: str) -> tuple[np.ndarray, TensorInfo]:
    """Encoded entries and their header entry."""
    raw = encode(np.asarray(values, dtype=np.float64), dtype)
    return raw, TensorInfo("w", dtype, raw.shape, Path("x"), 0, raw.nbytes)


def apply(edits: list[TensorEdit], raw: np.ndarray, info: TensorInfo) -> np.ndarray:
    return decode(evaluate_rows(edits, raw, info, 0, info.rows), info.dtype)


def one(value: float) -> np.ndarray:
    return np.array([[value]])


@pytest.mark.parametrize("dtype", TORCH)
def test_low_rank_edits_are_summed_in_float64_and_rounded_once(dtype: str) -> None:
    draw = np.random.default_rng(0)
    raw, info = stored(draw.normal(size=(6, 5)), dtype)
    edits: list[TensorEdit] = [LowRank("w", draw.normal(size=(6, 2)), draw.normal(size=(2, 5))) for _ in range(3)]
    exact = decode(raw, dtype).astype(np.float64)
    for edit in edits:
        assert isinstance(edit, LowRank)
        exact = exact + edit.u @ edit.v
    expected = torch.from_numpy(exact).to(TORCH[dtype])
    # torch rounds float64 to bf16 by way of float32; away from ties both agree.
    assert torch.equal(torch.from_numpy(apply(edits, raw, info)).double(), expected.double())


def test_small_edits_add_up_before_the_rounding() -> None:
    # One step of bf16 at 1 is 2**-7: a third of it is lost alone, and three thirds are not.
    raw, info = stored(one(1.0), "BF16")
    third = LowRank("w", one(2**-7 / 3), one(1.0))
    assert apply([third], raw, info).item() == 1.0
    assert apply([third, third, third], raw, info).item() == 1 + 2**-7
    # Rounding by way of float32 would land on the tie and go to even.
    assert apply([LowRank("w", one(2**-8 + 2**-40), one(1.0))], raw, info).item() == 1 + 2**-7


def test_replace_and_the_order_of_edits() -> None:
    raw, info = stored(np.ones((4, 3)), "F32")
    new = np.arange(12, dtype=np.float32).reshape(4, 3)
    shift = LowRank("w", np.full((4, 1), 0.5), np.ones((1, 3)))
    assert np.array_equal(apply([Replace("w", new)], raw, info), new)
    assert np.array_equal(apply([shift, Replace("w", new)], raw, info), new)
    assert np.array_equal(apply([Replace("w", new), shift], raw, info), new + 0.5)
    vector, entry = stored(np.ones(5), "F16")
    assert np.array_equal(apply([Replace("w", np.full(5, 0.1))], vector, entry), np.full(5, np.float16(0.1)))


def test_blocks_of_rows_give_the_whole() -> None:
    draw = np.random.default_rng(1)
    raw, info = stored(draw.normal(size=(7, 4)), "BF16")
    for edit in (LowRank("w", draw.normal(size=(7, 2)), draw.normal(size=(2, 4))), Replace("w", draw.random((7, 4)))):
        whole = evaluate_rows([edit], raw, info, 0, 7)
        parts = [evaluate_rows([edit], raw[start:stop], info, start, stop) for start, stop in ((0, 3), (3, 4), (4, 7))]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    ("dtype", "value", "fits"), [("F16", 65519.0, True), ("F16", 65520.0, False), ("F32", 1e39, False)]
)
def test_overflow_diverged(dtype: str, value: float, fits: bool) -> None:
    raw, info = stored(one(0.0), dtype)
    for edit in (LowRank("w", one(value), one(1.0)), Replace("w", one(value))):
        if fits:
            assert np.isfinite(apply([edit], raw, info)).all()
            continue
        with pytest.raises(DivergedError, match=f"w overflows its stored dtype {dtype}") as caught:
            apply([edit], raw, info)
        assert caught.value.exit_code == 9


@pytest.mark.parametrize(
    "edit",
    [
        LowRank("w", np.ones((3, 2)), np.ones((2, 4))),
        LowRank("w", np.ones((4, 2)), np.ones((2, 4))),
        LowRank("w", np.ones((4, 2)), np.ones((1, 3))),
        LowRank("w", np.ones(4), np.ones(3)),
        Replace("w", np.ones((3, 4))),
        Replace("w", np.ones(12)),
    ],
)
def test_wrong_shape_is_a_bug_of_the_method(edit: TensorEdit) -> None:
    _, info = stored(np.ones((4, 3)), "F32")
    with pytest.raises(SurgeryError, match="edit of w") as caught:
        require_fit(edit, info)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_edit_that_is_not_finite_diverged(bad: float) -> None:
    _, info = stored(np.ones((2, 2)), "F32")
    values = np.array([[1.0, bad], [0.0, 1.0]])
    for edit in (LowRank("w", values, np.eye(2)), LowRank("w", np.eye(2), values), Replace("w", values)):
        with pytest.raises(DivergedError, match="w holds NaN or Inf"):
            require_fit(edit, info)


def test_edits_without_a_writer_are_refused() -> None:
    replace = Replace("w", np.ones(1))
    with pytest.raises(SurgeryError, match="kind Config"):
        tensor_edits([Config(("config.json", "x"), 1)])
    with pytest.raises(SurgeryError, match="w is replaced twice"):
        tensor_edits([replace, replace])
    kept: list[Edit] = [replace, LowRank("w", one(1), one(1))]
    assert tensor_edits(kept) == kept


def write(source: Path, out: Path, edits: list[TensorEdit]) -> list[TensorChange]:
    checkpoint = Checkpoint.open(source)
    with Publication(checkpoint, out, rewrite=sorted({edit.name for edit in edits})) as publication:
        changes = write_edits(checkpoint, publication, edits, lambda name: name.split(".")[-2])
        publication.publish()
    return changes


def test_record_of_a_change(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = checkpoints["tied_llama"]
    before = load_file(source / "model.safetensors")
    values = before[UP].double().numpy().copy()
    values[3, 5] += 1.0
    zero = LowRank(DOWN, np.zeros((32, 1)), np.zeros((1, 64)))
    first, second = write(source, tmp_path / "out", [Replace(UP, values), zero])
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert [name for name in before if not torch.equal(before[name], after[name])] == [UP]
    assert (first.name, first.role, first.entries, first.entries_changed, first.changed) == (
        UP,
        "up_proj",
        2048,
        1,
        True,
    )
    difference = (after[UP].double() - before[UP].double()).norm() / before[UP].double().norm()
    assert first.norm_change == pytest.approx(difference.item())
    assert (second.entries_changed, second.norm_change, second.changed) == (0, 0.0, False)
    # The second was targeted and matched, and nothing of it changed; the norm was never edited.
    rows = coverage([(UP, "up_proj"), (DOWN, "down_proj"), (NORM, "norm")], [first, second])
    assert rows == [
        RoleCoverage("up_proj", 1, 1, 1), RoleCoverage("down_proj", 1, 1, 0), RoleCoverage("norm", 1, 0, 0),
    ]  # fmt: skip
    assert coverage([], [first]) == [RoleCoverage("up_proj", 0, 0, 1)]


def test_edits_that_round_away_have_no_effect(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tiny = LowRank(UP, np.full((64, 1), 1e-12), np.ones((1, 32)))
    with pytest.raises(NoEffectError, match="1 tensors were edited") as caught:
        write(checkpoints["tied_llama"], tmp_path / "out", [tiny])
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_damaged_source_tensor_is_refused_when_it_is_read(
    bad: float, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoints["tied_llama"], tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors[UP][2, 3] = bad
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    shift = LowRank(UP, np.ones((64, 1)), np.ones((1, 32)))
    with pytest.raises(DamagedError) as caught:
        write(source, tmp_path / "out", [shift])
    assert caught.value.exit_code == 8
    assert UP in caught.value.what
    assert not (tmp_path / "out").exists()
    # A tensor that no edit reads is carried over as it is.
    write(source, tmp_path / "out", [LowRank(DOWN, np.ones((32, 1)), np.ones((1, 64)))])
    assert not load_file(tmp_path / "out" / "model.safetensors")[UP].isfinite().all()


def test_negative_zeros_keep_their_bits() -> None:
    raw = np.array([[-0.0, 0.0], [1.0, -0.0]], dtype="<f4")
    info = TensorInfo("w", "F32", (2, 2), Path("x"), 0, 16)
    result = evaluate_rows([LowRank("w", np.zeros((2, 1)), np.zeros((1, 2)))], raw, info, 0, 2)
    assert result.tobytes() == raw.tobytes()
