"""The pages of `eval` and `compare`."""

from __future__ import annotations

from pathlib import Path

from llmsurgery.cli.app import run
from llmsurgery.report.comparison import comparison_rows
from llmsurgery.report.tables_page import comparison_page

from .test_report import Outline


def test_eval_writes_a_page_and_a_failed_gate_does_not_stop_it(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    words = ["eval", str(checkpoints["tied_llama"]), "--text", str(data_files["text"]), "-q"]
    words += ["--require", "utility.ppl<=1", "--report"]
    assert run([*words, str(tmp_path / "page.html")]) == 6
    found = Outline((tmp_path / "page.html").read_text("utf-8"))
    assert "1 of 1 gates failed" in found.text
    assert "utility.ppl" in found.text
    assert "script" not in {tag for tag, _ in found.elements}
    assert run([*words, str(tmp_path / "page.html")]) == 2
    assert run([*words, str(tmp_path / "no" / "page.html")]) == 2


def test_comparison_shows_every_recipe_and_draws_the_trade_off() -> None:
    cost = {"seconds": 2.0, "rss_bytes": 2**20}
    kept = {"forget.token_prob": 0.2, "retain.token_prob": 0.8}
    rows = [
        {"label": "<b>flat", "exit_code": 0, "shares": kept, "cost": cost, "record": {"steps": 3}},
        {"label": "npo", "exit_code": 9, "error": {"what": "NaN"}},
    ]
    document = {"rows": rows, "front": ["<b>flat"]}
    found = Outline(comparison_page(document, comparison_rows(document), [("<b>flat", 0.2, 0.8)], True))
    assert "Ended in an error: npo" in found.text
    assert "<b>flat" in found.text
    assert "exit 9: NaN" in found.text
    (circle,) = (given for tag, given in found.elements if tag == "circle")
    # A fifth from the left and a fifth from above, inside the margins.
    assert (circle["cx"], circle["cy"], circle["class"]) == ("85.6", "85.6", "after")
