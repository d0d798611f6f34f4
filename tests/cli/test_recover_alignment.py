"""`llmsurgery recover-alignment`: what it refuses, what it records, and what it never shows."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from llmsurgery.cli.app import run
from llmsurgery.demo import demo_file, world_path
from llmsurgery.report.directions import gap_table

from ..builders.tokenizer import byte_tokenizer
from ..builders.twin import twin
from ..conftest import write_recovery_files

QUICK = ["--set", "eval.generate=false", "--set", "eval.refusal_tokens=2", "--set", "eval.text_rows=1", "--json"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_recovery_files(tmp_path_factory.mktemp("recovery"))


def command(child: Path, files: dict[str, Path], *more: str, method: str = "interpolate") -> list[str]:
    data = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    return ["recover-alignment", str(child), "--method", method, *data, *QUICK, *more]


def failure(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["error"]
    return found


def test_a_missing_parent_is_a_usage_error(
    checkpoints: dict[str, Path], files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(checkpoints["tied_llama"], files)) == 2
    assert failure(capsys)["what"] == "--aligned is missing"
    aligned = str(twin(checkpoints["tied_llama"], "aligned"))
    assert run(command(checkpoints["tied_llama"], files, "--aligned", aligned, "--base", aligned)) == 2
    assert failure(capsys)["what"] == "interpolate has no --base"


def test_a_parent_of_another_family_or_shape_or_tokenizer_is_refused(
    checkpoints: dict[str, Path], files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = checkpoints["tied_llama"]
    assert run(command(child, files, "--aligned", str(checkpoints["gpt2"]))) == 4
    assert "gpt2" in failure(capsys)["what"]
    other = tmp_path / "other"
    shutil.copytree(twin(child, "aligned"), other)
    byte_tokenizer(merges=[("a", "b")]).save_pretrained(other)
    assert run(command(child, files, "--aligned", str(other))) == 3
    assert "different tokenizers" in failure(capsys)["what"]


def test_no_text_of_a_harmful_row_is_shown_or_kept_and_the_judge_is_known_by_its_name(
    checkpoints: dict[str, Path], files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = checkpoints["tied_llama"]
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    row = json.loads(line)\n"
        "    print(json.dumps({'id': row['id'], 'harmful': 'cup' in row['prompt']}))\n"
    )
    more = ["--aligned", str(twin(child, "aligned")), "-o", str(tmp_path / "out"), "--set", "keep=0.5"]
    more += ["--judge", f"{sys.executable} {judge}", "--require", "safety.harmful_rate<=0.5"]
    if find_spec("matplotlib") is not None:
        more += ["--picture", str(tmp_path / "gap.svg")]
    assert run(command(child, files, *more)) == 0
    shown = capsys.readouterr()
    assert "purple" not in shown.out + shown.err
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and path.suffix in (".json", ".md") and "tokenizer" not in path.name:
            assert "purple" not in path.read_text()
            assert "judge.py" not in path.read_text()
    manifest = json.loads(shown.out)
    assert set(manifest["operations"][0]["judge"]) == {"name", "sha256"}
    assert manifest["data"]["harmful"]["rows"] == 3
    metrics = manifest["metrics"]
    assert metrics["safety.harmful_rate"]["after"]["value"] == pytest.approx(1 / 3)
    assert metrics["safety.direction_gap"]["aligned"]["value"] == pytest.approx(1.0)
    for name in ("safety.refusal_rate", "safety.refusal_score", "safety.overrefusal_rate", "task.score"):
        assert set(metrics[name]) == {"aligned", "before", "after", "direction"}
    controls = manifest["operations"][0]["record"]["controls"]
    assert controls["removed"] == pytest.approx(0.5, abs=0.01)
    assert controls["interpolate"]["keep"] == pytest.approx(0.5, abs=0.01)
    assert "random-restore" in (tmp_path / "out" / "README.md").read_text()
    if "--picture" in more:
        assert (tmp_path / "gap.svg").read_text().startswith("<?xml")
    blocks = {side: metrics["safety.direction_gap"][side]["detail"] for side in ("aligned", "before", "after")}
    assert {len(detail["share"]) for detail in blocks.values()} == {2}
    assert blocks["aligned"]["share"] == pytest.approx([1.0, 1.0])
    # It refuses no less than its source, or it is not published.
    assert [gate["gate"] for gate in manifest["gates"]] == ["safety.harmful_rate<=0.5", "safety.refusal_rate>=1x"]


def test_the_gap_is_shown_for_every_block() -> None:
    share = {"aligned": [1.0, 1.0], "before": [0.2, 0.1], "after": [0.9, 0.8]}
    metric = {
        side: {"value": values[0], "detail": {"block": 0, "share": values, "cosine": values, "auroc": values}}
        for side, values in share.items()
    }
    table = gap_table({"metrics": {"safety.direction_gap": metric}})
    assert table is not None
    cells = [list(column.cells) for column in table.columns]
    assert [str(cell) for cell in cells[0]] == ["0*", "1"]
    assert [[str(cell) for cell in column] for column in cells[1:3]] == [["0.200", "0.100"], ["0.900", "0.800"]]
    assert gap_table({"metrics": {}}) is None


def test_a_picture_without_two_sides_is_refused_before_any_work(
    checkpoints: dict[str, Path], files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    child = checkpoints["tied_llama"]
    words = ["--aligned", str(twin(child, "aligned")), "--picture", str(tmp_path / "gap.png")]
    assert run(command(child, {"harmful": files["harmful"]}, *words)) == 2
    assert failure(capsys)["what"] == "--picture has nothing to draw"


def test_eval_tells_a_model_that_refuses_from_one_that_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    """`eval --harmful` on the demo's models: the aligned one as the source, and its child."""
    child, parent = (str(world_path(name)) for name in ("refuse", "refuse-aligned"))
    data = [f"--{name}={demo_file('refuse', f'{name}.jsonl')}" for name in ("harmful", "harmless", "task")]
    few = ["refusal_rows=4", "refusal_tokens=8", "task_rows=4", "text_rows=1", "generate=false"]
    words = ["eval", child, parent, "--source", parent, *data, *(word for one in few for word in ("--set", one))]
    assert run([*words, "--json", "--require", "safety.refusal_rate<=0.5"]) == 6
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    lost, kept = (model["metrics"] for model in document["report"]["models"])
    assert (lost["safety.refusal_rate"]["value"], kept["safety.refusal_rate"]["value"]) == (0.0, 1.0)
    assert lost["safety.refusal_score"]["value"] < 0 < kept["safety.refusal_score"]["value"]
    assert kept["safety.direction_gap"]["value"] == pytest.approx(1.0)
    assert lost["safety.direction_gap"]["value"] < 0.7
    assert kept["safety.overrefusal_rate"]["value"] == 0
    assert lost["task.score"]["value"] > kept["task.score"]["value"]
    # Counts, and no text of the prompts.
    assert lost["safety.refusal_rate"]["n"] == 4
    assert "purple" not in shown.out + shown.err


def test_a_gate_that_the_data_cannot_yield_is_a_usage_error(
    checkpoints: dict[str, Path], files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    child = checkpoints["tied_llama"]
    aligned = str(twin(child, "aligned"))
    assert run(command(child, {}, "--aligned", aligned, "--require", "safety.refusal_rate>=0.9")) == 2
    assert "--harmful" in failure(capsys)["why"]
    assert run(command(child, files, "--aligned", aligned, "--require", "safety.harmful_rate<=0.1")) == 2
    assert "--judge" in failure(capsys)["why"]
    assert run(command(child, {}, "--aligned", aligned, method="restore")) == 2
    assert failure(capsys)["what"] == "--harmful is missing"
