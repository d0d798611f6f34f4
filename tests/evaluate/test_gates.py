"""Gates: parsing, relative bounds, and refusals before any work."""

from __future__ import annotations

import math

import pytest

from llmsurgery.errors import UsageError
from llmsurgery.evaluate.gates import METRICS, NEEDS, Gate, check_gates, parse_gate

ALL = {"forget", "retain", "text", "answers"}


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("forget.token_prob<=0.15x", Gate("forget.token_prob", "<=", 0.15, True)),
        ("retain.prob>=0.9x", Gate("retain.prob", ">=", 0.9, True)),
        ("utility.ppl<=12", Gate("utility.ppl", "<=", 12.0, False)),
        ("  utility.kl <= 1e-3 ", Gate("utility.kl", "<=", 0.001, False)),
        ("retain.rouge_l >= .5x", Gate("retain.rouge_l", ">=", 0.5, True)),
        ("utility.kl>=-1", Gate("utility.kl", ">=", -1.0, False)),
    ],
)
def test_parsing(text: str, gate: Gate) -> None:
    assert parse_gate(text, ALL) == gate
    assert parse_gate(str(gate), ALL) == gate


@pytest.mark.parametrize(
    "text",
    [
        "",
        "forget.prob",
        "forget.prob<0.5",
        "forget.prob==0.5",
        "forget.prob<=",
        "<=0.5",
        "forget.prob<=half",
        "forget.prob<=0.5y",
        "forget.prob<=0.5xx",
        "forget.prob<=0.5 or so",
        "forget.prob<=0.5 x",
        "forget.prob<=1-2",
        "forget.prob<=e",
        "forget.prob<=nan",
        "forget.prob<=inf",
        "forget.prob<=1e999",
        "0.1<=forget.prob<=0.5",
        "forget.prob<=0.5;utility.kl<=1",
    ],
)
def test_garbage_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gate(text, ALL)
    assert caught.value.exit_code == 2


def test_unknown_metric_comes_with_the_three_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown metric 'forget\.tokn_prob'") as caught:
        parse_gate("forget.tokn_prob<=0.5", ALL)
    assert caught.value.exit_code == 2
    names = caught.value.why.removeprefix("nearest: ").split(", ")
    assert names[0] == "forget.token_prob"
    assert len(names) == 3
    assert set(names) <= set(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_metric_without_its_data_is_refused(name: str) -> None:
    needs = set(METRICS[name].needs)
    assert parse_gate(f"{name}<=1", needs).metric == name
    for missing in needs:
        with pytest.raises(UsageError, match=f"{name} cannot be computed") as caught:
            parse_gate(f"{name}<=1", set(NEEDS) - {missing})
        assert caught.value.exit_code == 2
        assert NEEDS[missing][0] in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value", "before", "holds"),
    [
        ("forget.prob<=0.5", 0.5, None, True),
        ("forget.prob<=0.5", 0.51, None, False),
        ("forget.prob>=0.5", 0.5, None, True),
        ("forget.prob>=0.5", 0.49, None, False),
        ("forget.prob<=0.5x", 0.4, 0.8, True),
        ("forget.prob<=0.5x", 0.41, 0.8, False),
        ("forget.prob>=0.5x", 0.41, 0.8, True),
        ("forget.prob<=0.5x", 0.1, None, False),
        ("forget.prob>=0.5x", 0.1, None, False),
        ("forget.prob<=0.5", math.nan, None, False),
        ("forget.prob>=0.5", math.nan, None, False),
        ("forget.prob<=0.5x", 0.1, math.nan, False),
        ("forget.prob>=0.5x", 0.1, math.nan, False),
    ],
)
def test_bounds_and_nan(text: str, value: float, before: float | None, holds: bool) -> None:
    assert parse_gate(text, ALL).holds(value, before) is holds


def test_outcomes_name_limit_and_value() -> None:
    gates = [parse_gate(text, ALL) for text in ("forget.prob<=0.5x", "utility.ppl<=20")]
    first, second = check_gates(gates, {"forget.prob": 0.3, "utility.ppl": 21.0}, {"forget.prob": 0.8})
    assert (first.gate, first.value, first.passed) == ("forget.prob<=0.5x", 0.3, True)
    assert first.limit == pytest.approx(0.4)
    assert (second.gate, second.limit, second.value, second.passed) == ("utility.ppl<=20", 20.0, 21.0, False)
