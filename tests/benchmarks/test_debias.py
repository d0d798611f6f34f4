"""The benchmark of answer letters runs on the demo, computes nothing twice, and predicts what its results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import debias_smollm2
from benchmarks.table.letters import debias_smollm2 as section
from llmsurgery.demo import demo_file, world_path


def test_kept_answers_predict_the_reloaded_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debias_smollm2, "write_result", lambda name, content: tmp_path)
    files = [str(demo_file("letters", f"{name}.jsonl")) for name in ("mcq", "text")]
    words = [str(world_path("letters")), *files, "--rows", "24", "--reloaded", "6", "--halves", "4"]
    result = debias_smollm2.main([*words, "--text-rows", "4", "--methods", "pride"])
    found = result["methods"]["pride"]
    # 24 questions of the source in four orders, and 6 of the result.
    assert result["forwards"] == 24 * 4 + 6 * 4
    assert found["metrics"]["mcq.rstd"]["after"]["value"] == pytest.approx(found["predicted"]["rstd"], abs=1e-6)
    assert found["metrics"]["mcq.accuracy"]["after"]["value"] == pytest.approx(found["predicted"]["accuracy"])
    assert result["halves"]["share"]["rstd"]["mean"] < 0.5 * result["halves"]["base"]["rstd"]["mean"]
    assert found["accuracy_change"]["interval"][0] > 0
    assert "`pride`" in section(result)
