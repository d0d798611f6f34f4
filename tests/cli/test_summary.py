"""`--summary` and GITHUB_STEP_SUMMARY: appended, in Markdown, and only where it was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmsurgery.cli.app import run
from llmsurgery.cli.output import Output
from llmsurgery.cli.summary import VARIABLE, summary
from llmsurgery.errors import GateError, ResourceError
from llmsurgery.report.summary import comparison_summary, run_summary


def describe(document: Any) -> str:
    return f"{document}\n"


def tell(given: str | None, document: object) -> None:
    with summary(given, Output(quiet=True), lambda: describe) as write:
        write(document)


def test_given_file_wins_over_the_environment_and_none_switches_it_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(None, "nowhere")
    page, own = tmp_path / "page.md", tmp_path / "own.md"
    monkeypatch.setenv(VARIABLE, str(page))
    page.write_text("before\n")
    tell(None, "first")
    tell(str(own), "second")
    tell("none", "third")
    assert (page.read_text(), own.read_text()) == ("before\nfirst\n", "second\n")
    error = GateError("a gate", "", "")
    error.report = {"what": "failed"}
    with pytest.raises(GateError), summary(None, Output(quiet=True), lambda: describe):
        raise error
    assert page.read_text().endswith("{'what': 'failed'}\n")


def test_file_that_cannot_be_written_stops_the_command_before_and_a_page_that_cannot_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ResourceError):
        tell(str(tmp_path / "no" / "file.md"), "x")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with summary(None, Output(), lambda: describe) as write:
        write("x")
    assert "cannot be written" in capsys.readouterr().err


def test_eval_appends_figures_and_gates(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    model, page = str(checkpoints["tied_llama"]), tmp_path / "page.md"
    words = ["eval", model, "--text", str(data_files["text"]), "--summary", str(page), "-q"]
    assert run([*words, "--require", "utility.ppl>=1"]) == 0
    assert run([*words, "--require", "utility.ppl<=1"]) == 6
    text = page.read_text("utf-8")
    assert text.index("all 1 gates held") < text.index("1 of 1 gates failed")
    assert text.count("| utility.ppl |") == 2


def test_text_of_users_stays_text() -> None:
    figure = {"value": 1.0, "n": 2, "interval": None}
    manifest = {
        "operations": [{"task": "prune", "method": "wanda"}],
        "source": {"given": "<img src=x>|`a`"},
        "gates": [{"gate": "utility.ppl<=2", "limit": 2.0, "value": 1.0, "passed": True}],
        "metrics": {"utility.ppl": {"before": figure, "after": figure, "direction": "lower"}},
        "notices": ["![a](http://example.org/a.png)\n# big"],
        "cost": {"seconds": 1.0, "threads": 1, "rss_bytes": 2**20},
    }
    text = run_summary(manifest)
    assert "<img" not in text
    assert "![" not in text
    assert "\n# big" not in text
    assert "| utility.ppl | 1 | 1 |" in text
    assert "none of 2 trials" in run_summary({"trials": [{}, {}]})
    assert "recipe" in comparison_summary({"rows": [], "front": []})
