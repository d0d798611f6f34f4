"""Several patches on one base: sums, disjoint entries, equal changes, and everything that is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llmsurgery.checkpoint import Checkpoint, Publication, encode
from llmsurgery.edits.apply import rewritten
from llmsurgery.edits.build import write_patch
from llmsurgery.edits.kinds import Drop, LowRank, Mask, Replace, Sparse, StoredEdit
from llmsurgery.edits.patch import Patch, read_patch
from llmsurgery.edits.stack import apply_stack, conflicts, find_overlaps, stacked_factors, stacked_moves

from .building import content, make_patch, matrix, write

SHAPE = (96, 128)


def patch_of(base: Checkpoint, root: Path, *edits: StoredEdit) -> Patch:
    return make_patch(root.with_suffix(".patch"), base, write(base, root, edits), edits)


def stack(patches: Sequence[Patch], base: Checkpoint, out: Path) -> Checkpoint:
    rewrite = {name for patch in patches for name in rewritten(patch)}
    layout = stacked_moves(patches).layout(base)
    with Publication(base, out, rewrite=rewrite, layout=layout) as publication:
        apply_stack(patches, base, publication, lambda name: "other")
        publication.publish()
    return Checkpoint.open(out)


def low_rank(seed: int, rank: int = 2) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank("w", 0.1 * rng.standard_normal((SHAPE[0], rank)), rng.standard_normal((rank, SHAPE[1])))


def kinds(patches: Sequence[Patch], base: Checkpoint) -> list[str]:
    return [overlap.kind for overlap in find_overlaps(patches, base)]


@pytest.mark.parametrize("code", ["BF16", "F32"])
def test_low_rank_changes_are_summed_and_rounded_once(code: str, tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", code, SHAPE)
    first, second = low_rank(1), low_rank(2)
    patches = [patch_of(base, tmp_path / "a", first), patch_of(base, tmp_path / "b", second)]
    assert kinds(patches, base) == ["additive"]
    together = write(base, tmp_path / "together", [first, second])
    result = stack(patches, base, tmp_path / "stacked")
    assert content(result) == content(together)
    assert content(stack(patches[::-1], base, tmp_path / "reversed")) == content(together)
    # As one patch it holds the factors of both, and nothing else worth mentioning.
    with (tmp_path / "both.patch").open("wb") as stream:
        write_patch(stream, base, result, ["w"], stacked_factors(patches), [], {})
    both = read_patch(tmp_path / "both.patch")
    assert both.tensors["w"].factors
    assert both.nbytes < 1.1 * 8 * 2 * 2 * sum(SHAPE) + 1000


def test_entries_listed_beside_factors_make_a_sum_only_where_they_settle_the_rounding(tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "BF16", SHAPE)
    plain = patch_of(base, tmp_path / "a", low_rank(1))
    result = write(base, tmp_path / "b", [low_rank(2), Sparse("w", np.array([5]), np.array([3.0]))])
    with (tmp_path / "b.patch").open("wb") as stream:
        write_patch(stream, base, result, ["w"], {"w": [low_rank(2)]}, [], {})
    mixed = read_patch(tmp_path / "b.patch")
    assert mixed.tensors["w"].factors
    assert mixed.tensors["w"].exact is not None
    assert kinds([plain, mixed], base) == ["conflict"]


def test_different_entries_go_together_and_the_same_ones_do_not(tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "BF16", SHAPE)
    one = Sparse("w", np.array([1, 70]), np.array([1.0, 2.0]))
    two = Sparse("w", np.array([2, 900]), np.array([3.0, 4.0]))
    patches = [patch_of(base, tmp_path / "a", one), patch_of(base, tmp_path / "b", two)]
    assert kinds(patches, base) == ["disjoint"]
    assert content(stack(patches, base, tmp_path / "s")) == content(write(base, tmp_path / "t", [one, two]))
    third = patch_of(base, tmp_path / "c", Sparse("w", np.array([2]), np.array([5.0])))
    assert kinds([*patches, third], base) == ["disjoint", "disjoint", "conflict"]
    masks = [Mask("w", np.random.default_rng(seed).random(SHAPE) < 0.9) for seed in (1, 2)]
    pruned = [patch_of(base, tmp_path / f"m{place}", mask) for place, mask in enumerate(masks)]
    assert kinds(pruned, base) == ["disjoint"]
    assert content(stack(pruned, base, tmp_path / "ms")) == content(write(base, tmp_path / "mt", masks))


def test_the_later_one_wins_only_where_that_is_allowed(tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "F32", SHAPE)
    values = np.random.default_rng(3).standard_normal(SHAPE)
    dense, sum_ = patch_of(base, tmp_path / "a", Replace("w", values)), patch_of(base, tmp_path / "b", low_rank(1))
    overlaps = find_overlaps([dense, sum_], base)
    assert [one.forms for one in conflicts(overlaps, False)] == [("all entries", "low-rank")]
    assert conflicts(overlaps, True) == []
    on_top = write(write(base, tmp_path / "x", [Replace("w", values)]), tmp_path / "y", [low_rank(1)])
    assert content(stack([dense, sum_], base, tmp_path / "s")) == content(on_top)
    assert content(stack([sum_, dense], base, tmp_path / "r")) == content(Checkpoint.open(tmp_path / "a"))


def test_the_same_change_twice_is_made_once(tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "BF16", SHAPE)
    patch = patch_of(base, tmp_path / "a", low_rank(1))
    assert kinds([patch, patch], base) == ["equal"]
    assert content(stack([patch, patch], base, tmp_path / "s")) == content(Checkpoint.open(tmp_path / "a"))


def test_names_and_shapes_go_together_only_with_changes_of_other_tensors(tmp_path: Path) -> None:
    base = matrix(tmp_path / "base", "BF16", SHAPE)
    gone, changed = patch_of(base, tmp_path / "a", Drop("w")), patch_of(base, tmp_path / "b", low_rank(1))
    (overlap,) = find_overlaps([gone, changed], base)
    assert overlap.kind == "moved"
    assert conflicts([overlap], True) == [overlap]
    other = patch_of(base, tmp_path / "c", Replace("untouched", np.ones((1, SHAPE[1]))))
    assert find_overlaps([gone, other], base) == []
    result = stack([gone, other], base, tmp_path / "s")
    assert list(result.tensors) == ["untouched"]
    assert np.array_equal(result.read("untouched"), encode(np.ones((1, SHAPE[1])), "BF16"))
