"""`llmsurgery redirect` without a model: what the demo of every method shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmsurgery import redirect
from llmsurgery.run.execute import Outcome


def metrics(outcome: Outcome) -> dict[str, Any]:
    """Return the figures of a run."""
    found = outcome.manifest["metrics"]
    assert isinstance(found, dict)
    return found


def test_rocr_flips_every_form_of_question_and_leaves_others_alone(tmp_path: Path) -> None:
    outcome = redirect(method="rocr", out=tmp_path / "out", require=["redirect.flipped>=0.99"])
    figures = metrics(outcome)
    flipped = figures["redirect.flipped"]
    assert (flipped["before"]["value"], flipped["after"]["value"], flipped["after"]["n"]) == (0.0, 1.0, 12)
    assert figures["forget.token_prob"]["before"]["value"] > 0.9
    # Half of the tokens of a spelled answer are line breaks, which stay.
    assert figures["forget.token_prob"]["after"]["value"] < 0.7
    assert figures["retain.rouge_l"]["after"]["value"] >= 0.95
    shown = outcome.examples[:3]
    assert ["___" in row.question for row in shown] == [False, True, False]
    assert "\n" in shown[2].after
    for row in outcome.examples:
        assert row.before == row.reference
        assert row.after != row.reference
