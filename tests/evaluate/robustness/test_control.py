"""Control rows in the place of a control model: their gain, what is left of recovery, and rows that cannot serve."""

from __future__ import annotations

import pytest

from llmsurgery.data.records import Row
from llmsurgery.errors import InputError
from llmsurgery.evaluate.robustness.base import Point, Trial
from llmsurgery.evaluate.robustness.control import check_control
from llmsurgery.evaluate.robustness.verdict import Judgement, judge_attack

KNOWN = {"0": 0.9, "1": 0.9}


def judge(after: float, control_after: float, source_control: tuple[float, float] = (0.3, 0.2)) -> Judgement:
    asked = {"0": 0.1, "1": 0.3}
    point = Point("a", {"0": after, "1": after}, control={"0": control_after, "1": control_after + 0.2})
    edited = Trial({"0": 0.1, "1": 0.1}, [point], control=asked)
    return judge_attack(edited, Trial(KNOWN, [], control=dict(zip("01", source_control, strict=True))), None, 0.5, {})


def test_worked_numbers() -> None:
    found = judge(0.5, 0.26)
    assert found.figures["recovery"].value == pytest.approx(0.5)
    # (.36 - .2) / (.9 - .1): what the attack adds, not how far the rows are.
    assert found.figures["control_gain"].value == pytest.approx(0.2)
    assert found.figures["excess"].value == pytest.approx(0.3)
    assert found.figures["excess"].interval == pytest.approx((0.3, 0.3))
    assert found.record["control_gain"] == pytest.approx(0.2)
    rows = found.record["control_rows"]
    assert rows == {"n": 2, "left_out": 0, "source": 0.25, "before": 0.2, "after": pytest.approx(0.36)}
    assert (found.verdict, found.reason) == ("PARTIAL", "")


@pytest.mark.parametrize(
    ("after", "control_after", "verdict"),
    [
        (0.12, 0.1, "ROBUST"),
        # The attack takes as much from the control rows as it leaves: what comes back is a lead all the same.
        (0.12, 0.04, "PARTIAL"),
        (0.6, 0.58, "INCONCLUSIVE"),
        (0.6, 0.3, "HIDDEN"),
    ],
)
def test_verdict_rests_on_the_lead_over_the_rows(after: float, control_after: float, verdict: str) -> None:
    assert judge(after, control_after).verdict == verdict


def test_rows_that_the_source_knows_do_not_count() -> None:
    found = judge(0.5, 0.26, source_control=(0.3, 0.6))
    assert found.record["control_rows"]["n"] == 1  # type: ignore[index]
    assert found.figures["control_gain"].n == 1
    # Without any row left there is no control, and names stay so that a gate fails.
    none = judge(0.5, 0.26, source_control=(0.7, 0.6))
    assert none.reason == "without a control"
    assert none.figures["control_gain"].value is None
    assert none.figures["excess"].value is None
    assert none.record["control_rows"] == {"n": 0, "left_out": 2}


def test_a_control_model_goes_before_control_rows() -> None:
    point = Point("a", {"0": 0.5}, control={"0": 0.5})
    edited, model = Trial({"0": 0.1}, [point], control={"0": 0.1}), Trial({"0": 0.05}, [Point("a", {"0": 0.2})])
    found = judge_attack(edited, Trial({"0": 0.9}, [], control={"0": 0.1}), model, 0.5, {})
    assert found.figures["excess"].value == pytest.approx(0.353, abs=5e-4)
    assert found.figures["control_gain"].value == pytest.approx(0.5)


def test_rows_that_the_attack_may_train_on_are_refused() -> None:
    row, other = Row("qa", "Who?", "Orla."), Row("qa", "Where?", "There.")
    check_control({"forget": [row], "control": [other]})
    for name in ("forget", "retain"):
        with pytest.raises(InputError, match="1 rows of --control"):
            check_control({name: [row], "control": [Row("qa", "Who?", "Tam."), other]})
