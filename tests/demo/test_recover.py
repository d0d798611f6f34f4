"""`llmsurgery recover-alignment` without a model: refusals that fine-tuning erased come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmsurgery import recover_alignment
from llmsurgery.run.execute import Outcome


def figures(outcome: Outcome, name: str) -> tuple[float, float, float]:
    """Return a figure of the aligned model, before and after."""
    metrics: Any = outcome.manifest["metrics"]
    found = metrics[name]
    aligned, before, after = (found[side]["value"] for side in ("aligned", "before", "after"))
    return aligned, before, after


def test_restore_brings_refusals_back_and_keeps_the_task_where_as_many_random_entries_do_not(tmp_path: Path) -> None:
    outcome = recover_alignment(out=tmp_path / "out", settings={"eval.refusal_tokens": 8})
    aligned, before, after = figures(outcome, "safety.refusal_rate")
    assert aligned >= 0.9
    assert before <= 0.2
    assert after >= before + 0.5
    _, task, kept = figures(outcome, "task.score")
    assert kept >= 0.95 * task
    manifest: Any = outcome.manifest
    controls = manifest["operations"][0]["record"]["controls"]
    assert controls["random-restore"]["entries"] == controls["entries"]
    assert controls["random-restore"]["safety.refusal_rate"] <= after - 0.4
    assert manifest["source"]["path"] == "demo"
    assert manifest["models"]["aligned"]["path"] == "demo"


@pytest.mark.parametrize("method", ["alignguard", "direction", "safe-lora", "resta", "antidote", "interpolate"])
def test_other_methods_run_on_the_demo_and_do_not_publish_less_refusals(method: str, tmp_path: Path) -> None:
    quick = {"eval.refusal_rows": 8, "eval.refusal_tokens": 8, "eval.task_rows": 8, "eval.text_rows": 2}
    outcome = recover_alignment(method=method, out=tmp_path / "out", settings={"controls": False, **quick})
    _, before, after = figures(outcome, "safety.refusal_rate")
    assert after >= before
