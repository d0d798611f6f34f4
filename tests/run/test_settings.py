"""Options that only some methods have, and what all methods of a task have in common."""

from __future__ import annotations

from typing import Any

import pytest

from llmsurgery.errors import UsageError
from llmsurgery.evaluate.gates import METRICS, NEEDS
from llmsurgery.methods.registry import all_methods, find_method
from llmsurgery.methods.tasks import TASKS
from llmsurgery.run.request import Request
from llmsurgery.run.settings import check_untrained


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        ("wanda", {"until": "none"}, "it does not train"),
        ("wanda", {"until": "forget.prob<=0.1"}, "it does not train"),
        ("wanda", {"quantize": "nf4"}, "it does not train"),
        ("wanda", {"guard": "self"}, "it does not train"),
        ("pat", {"until": "forget.prob<=0.1"}, "nothing is to be forgotten"),
        ("fakeln", {"guard": "self"}, "nothing is to be forgotten"),
    ],
)
def test_options_of_training_are_refused_where_nothing_trains(method: str, options: dict[str, Any], why: str) -> None:
    found = find_method(method)
    with pytest.raises(UsageError) as caught:
        check_untrained(found, Request(found.spec.task, method, **options))
    assert caught.value.exit_code == 2
    assert caught.value.why == why
    assert f"{method} has no --{next(iter(options))}" in caught.value.what


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("wanda", {"guard": "none"}),
        ("pat", {"until": "none", "quantize": "nf4"}),
        ("flat", {"until": "forget.prob<=0.1", "guard": "self", "quantize": "int8"}),
    ],
)
def test_options_of_training_are_taken_where_they_say_something(method: str, options: dict[str, Any]) -> None:
    found = find_method(method)
    check_untrained(found, Request(found.spec.task, method, **options))


def test_every_task_is_described_once() -> None:
    assert {method.spec.task for method in all_methods()} == TASKS.keys()
    needed = {need for metric in METRICS.values() for need in metric.needs}
    for task in TASKS.values():
        assert set(task.measures) <= NEEDS.keys() & needed
