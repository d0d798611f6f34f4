"""Recovery, excess and verdicts: worked numbers, choice of points, and what cannot be said."""

from __future__ import annotations

import pytest

from llmsurgery.evaluate.robustness.base import Point, Trial
from llmsurgery.evaluate.robustness.points import excess, recovery
from llmsurgery.evaluate.robustness.verdict import Judgement, judge_attack


def rows(*values: float) -> dict[str, float]:
    return {str(i): value for i, value in enumerate(values)}


def flat(value: float, count: int = 4) -> dict[str, float]:
    return rows(*[value] * count)


def judge(
    before: float, after: float, control: tuple[float, float] | None = (0.05, 0.05), source: float = 0.9, weak: str = ""
) -> Judgement:
    edited = Trial(flat(before), [Point("a", flat(after))], weak=weak)
    aside = None if control is None else Trial(flat(control[0]), [Point("a", flat(control[1]))])
    return judge_attack(edited, Trial(flat(source), []), aside, 0.5, {})


def test_worked_numbers() -> None:
    assert recovery(0.1, 0.5, 0.9) == pytest.approx(0.5)
    assert excess(0.5, 0.2, 0.9, 0.05) == pytest.approx(0.353, abs=5e-4)
    assert recovery(0.86, 0.9, 0.9) is None
    assert excess(0.9, 0.9, 0.9, 0.88) is None


@pytest.mark.parametrize(
    ("before", "after", "control", "verdict"),
    [
        (0.1, 0.12, (0.05, 0.1), "ROBUST"),
        (0.1, 0.12, None, "ROBUST"),
        # Nothing came back, but the model knew more than the control all along.
        (0.3, 0.3, (0.05, 0.05), "PARTIAL"),
        (0.1, 0.5, (0.05, 0.2), "PARTIAL"),
        (0.1, 0.51, (0.05, 0.2), "HIDDEN"),
        (0.1, 0.9, None, "HIDDEN"),
        # The control learns the same: the attack teaches.
        (0.1, 0.9, (0.05, 0.88), "INCONCLUSIVE"),
        (0.87, 0.9, (0.05, 0.05), "INCONCLUSIVE"),
    ],
)
def test_verdicts(before: float, after: float, control: tuple[float, float] | None, verdict: str) -> None:
    found = judge(before, after, control)
    assert found.verdict == verdict
    assert found.record["verdict"] == verdict
    if control is None:
        assert found.reason == "without a control"
        assert "excess" not in found.figures
        assert found.record["excess"] is None


def test_a_weak_attack_makes_no_robust_model() -> None:
    found = judge(0.1, 0.1, control=None, weak="too few steps")
    assert (found.verdict, found.reason) == ("INCONCLUSIVE", "too few steps")
    assert judge(0.1, 0.8, weak="too few steps").verdict == "HIDDEN"


@pytest.mark.parametrize(("kept", "verdict"), [(0.44, "INCONCLUSIVE"), (0.46, "ROBUST")])
def test_an_attack_that_finds_little_in_the_source_makes_no_robust_model(kept: float, verdict: str) -> None:
    edited = Trial(flat(0.1), [Point("a", flat(0.1)), Point("b", flat(0.1))])
    source = Trial(flat(0.9), [Point("a", flat(0.1)), Point("b", flat(kept))])
    found = judge_attack(edited, source, None, 0.5, {})
    assert found.verdict == verdict
    assert ("the source itself knows" in found.reason) == (verdict == "INCONCLUSIVE")
    back = Trial(flat(0.1), [Point("a", flat(0.9))])
    assert judge_attack(back, source, None, 0.5, {}).verdict == "HIDDEN"


def test_nothing_unlearned_leaves_no_figure_to_pass_a_gate() -> None:
    found = judge(0.88, 0.9)
    assert found.figures["recovery"].value is None
    assert found.reason == "nothing was unlearned"
    assert judge(0.1, 0.9, source=0.4).reason.startswith("the source knows none of the forget rows")
    assert judge(0.1, 0.9, source=0.4).figures["recovery"].value is None


def test_rows_that_the_source_does_not_know_are_left_out() -> None:
    edited = Trial(rows(0.0, 0.0, 0.6), [Point("a", rows(0.5, 0.5, 0.9))])
    found = judge_attack(edited, Trial(rows(1.0, 1.0, 0.2), []), None, 0.5, {})
    assert found.record["n"] == 2
    assert found.record["left_out"] == 1
    assert found.record["recovery"] == pytest.approx(0.5)
    assert found.record["before"] == 0.0


def test_ruined_models_do_not_count() -> None:
    points = [Point("mild", flat(0.3), 0.81), Point("strong", flat(0.8), 0.79)]
    edited = Trial(flat(0.1), points, utility=1.0)
    found = judge_attack(edited, Trial(flat(0.9), []), None, 0.5, {})
    assert found.record["point"] == "mild"
    assert found.record["recovery"] == pytest.approx(0.25)
    assert [point["valid"] for point in found.record["points"]] == [True, False]  # type: ignore[attr-defined]
    ruined = Trial(flat(0.1), points[1:], utility=1.0)
    found = judge_attack(ruined, Trial(flat(0.9), []), None, 0.5, {})
    assert (found.verdict, found.reason) == ("INCONCLUSIVE", "every point of the attack ruined the model")
    assert found.figures["recovery"].value is None


def test_recovery_and_excess_each_take_their_strongest_point() -> None:
    edited = Trial(
        flat(0.1), [Point("taught", flat(0.9)), Point("hint", flat(0.6)), Point("aside", flat(1.0), counts=False)]
    )
    control = Trial(flat(0.1), [Point("hint", flat(0.1)), Point("taught", flat(0.8))])
    found = judge_attack(edited, Trial(flat(0.9), []), control, 0.5, {})
    assert found.record["recovery"] == pytest.approx(1.0)
    assert found.figures["recovery"].detail == {"point": "taught"}
    assert found.record["excess"] == pytest.approx(0.5 / 0.8)
    assert found.figures["excess"].detail == {"point": "hint"}
    assert found.record["control"] == {"before": pytest.approx(0.1), "after": pytest.approx(0.8)}


def test_intervals_resample_rows() -> None:
    edited = Trial(rows(0.0, 0.0, 0.0, 0.0), [Point("a", rows(0.0, 0.0, 1.0, 1.0))])
    found = judge_attack(edited, Trial(rows(1.0, 1.0, 1.0, 1.0), []), None, 0.5, {})
    low, high = found.figures["recovery"].interval or (None, None)
    assert low is not None
    assert high is not None
    assert 0.0 <= low < 0.5 < high <= 1.0


def test_points_may_hold_some_of_the_rows_and_a_control_may_lack_one() -> None:
    edited = Trial(rows(0.0, 0.4, 0.4), [Point("a", {"1": 0.5, "2": 0.9})])
    control = Trial({"0": 0.0, "1": 0.0}, [Point("a", {"1": 0.2})])
    found = judge_attack(edited, Trial(rows(1.0, 1.0, 1.0), []), control, 0.5, {})
    point = found.record["points"][0]  # type: ignore[index]
    assert (point["n"], point["before"], point["after"], point["control_after"]) == (1, 0.4, 0.5, 0.2)
    assert point["recovery"] == pytest.approx(0.1 / 0.6)
    # The numbers of the whole are those of the same rows.
    assert (found.record["n"], found.record["before"], found.record["after"]) == (1, 0.4, 0.5)


def test_tokens_that_the_control_knows_tell_nothing() -> None:
    edited = Trial(rows(1.0, 0.0, 0.0, 0.0), [Point("a", rows(1.0, 1.0, 1.0, 0.0))])
    control = Trial(rows(1.0, 0.0, 0.0, 0.0), [Point("a", rows(1.0, 0.0, 1.0, 0.0))])
    found = judge_attack(edited, Trial(rows(1.0, 1.0, 1.0, 0.0), []), control, 0.5, {}, only_told=True)
    assert (found.record["n"], found.record["left_out"]) == (2, 2)
    assert found.record["recovery"] == pytest.approx(1.0)
    assert found.record["excess"] == pytest.approx(0.5)
    # Without a control nothing can be told apart.
    alone = judge_attack(edited, Trial(rows(1.0, 1.0, 1.0, 0.0), []), None, 0.5, {}, only_told=True)
    assert alone.record["n"] == 3
