"""Two operations as one change of the first source, whatever they do to names and shapes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llmsurgery.checkpoint import Checkpoint
from llmsurgery.checkpoint.target import Claim
from llmsurgery.compute.progress import Silent
from llmsurgery.edits.arrange import arrange
from llmsurgery.edits.kinds import Rename, StoredEdit
from llmsurgery.errors import NoEffectError
from llmsurgery.run.chain_manifest import PASSED, Ran, chain_metrics
from llmsurgery.run.chain_result import open_whole, whole_change, write_whole
from llmsurgery.run.diff import kept_patch, moves_between

from ..edits.building import revert, write
from ..edits.test_shapes import CASES, UP, files, low_rank, model, stored

SECOND: list[StoredEdit] = [low_rank(UP.format(0), 12, 7)]


def merged(base: Checkpoint, root: Path, first: list[StoredEdit], second: list[StoredEdit]) -> Checkpoint:
    """Write two results in order, and then both changes at once."""
    middle = write(base, root / "middle", first)
    last = write(middle, root / "last", second)
    edited = [arrange(base, first).mentioned, arrange(middle, second).mentioned]
    whole = whole_change([base, middle, last], edited, Silent())
    with open_whole(whole, root / "out", False, False, Claim(root / "out", False)) as publication:
        write_whole(whole, publication, True, [middle, last])
        publication.publish()
    result = Checkpoint.open(root / "out")
    assert stored(result) == stored(last)
    return result


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("add", "slice rows"),
        ("drop block", "in place beside"),
        ("in place beside", "drop block"),
        ("slice columns", "drop block"),
        ("drop block", "slice twice"),
        ("slice rows", "drop a whole file"),
        ("swap", "rename, then change"),
        ("add, then change", "replace by another shape"),
        ("replace by another shape", "swap"),
    ],
)
def test_both_are_reverted_at_once(first: str, second: str, tmp_path: Path) -> None:
    base = model(tmp_path / "base", shards=True)
    before, edits = files(base.root), CASES[second]
    if (first, second) == ("drop block", "in place beside"):
        edits = edits[:2]
    elif second == "drop block" and first == "in place beside":
        # The first block's norm is gone by then.
        edits = [edit for edit in edits if edit.name != "model.layers.0.norm.weight"]
    result = merged(base, tmp_path, CASES[first], edits)
    assert files(revert(result, tmp_path / "reverted").root) == before


def test_factors_stay_where_one_operation_alone_changed_a_tensor(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    result = merged(base, tmp_path, [*SECOND, low_rank(UP.format(1), 12, 7)], [low_rank(UP.format(1), 12, 7)])
    kept = kept_patch(result, Silent())
    assert kept is not None
    assert list(kept.tensors) == [UP.format(0)]
    assert not moves_between(base, result, kept)


def test_operations_that_undo_each_other_have_no_effect(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    there: list[StoredEdit] = [Rename(UP.format(0), "other")]
    middle = write(base, tmp_path / "middle", there)
    last = write(middle, tmp_path / "last", [Rename("other", UP.format(0))])
    with pytest.raises(NoEffectError, match="model that they started from"):
        whole_change([base, middle, last], [["other", UP.format(0)]] * 2, Silent())


def test_a_figure_is_followed_through_steps_that_share_what_it_rests_on() -> None:
    def ran(name: str, more: dict[str, str], figures: dict[str, tuple[float, float, int]]) -> Ran:
        data = {key: {"sha256": digest} for key, digest in ({"forget": "f", "text": "t"} | more).items()}
        metrics = {
            metric: {
                "before": {"value": before, "n": count},
                "after": {"value": after, "n": count},
                "direction": "lower",
            }
            for metric, (before, after, count) in figures.items()
        }
        manifest: dict[str, Any] = {"data": data, "operations": [{"evaluation": {"text_rows": 8}}], "metrics": metrics}
        return Ran(cast(Any, SimpleNamespace(name=name)), PASSED, manifest)

    first = ran(
        "first",
        {"mcq": "m"},
        {"forget.token_prob": (0.9, 0.5, 4), "mcq.rstd": (40, 39, 10), "utility.ppl": (20, 22, 8)},
    )
    last = ran(
        "last",
        {"mcq": "m", "harmful": "h"},
        {"forget.token_prob": (0.5, 0.4, 4), "mcq.rstd": (38, 5, 5), "utility.ppl": (22, 24, 8)},
    )
    found = chain_metrics([first, last])
    assert (found["forget.token_prob"]["before"]["value"], found["forget.token_prob"]["after"]["value"]) == (0.9, 0.4)
    assert found["utility.ppl"]["before"]["value"] == 20
    assert "since" not in found["forget.token_prob"]
    # Half of the questions are not all of them.
    assert (found["mcq.rstd"]["before"]["value"], found["mcq.rstd"]["since"]) == (38, "last")
    other = ran("last", {"forget": "another file"}, {"forget.token_prob": (0.5, 0.4, 4)})
    assert chain_metrics([first, other])["forget.token_prob"]["since"] == "last"
