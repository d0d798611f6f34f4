"""`llmsurgery debias` without a model: what the demo of every method shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmsurgery import debias
from llmsurgery.cli.app import run
from llmsurgery.demo import demo_file, world_path
from llmsurgery.demo.kinds import data_files
from llmsurgery.demo.shapes import data_files as shapes_files


def metrics(out: Path, method: str, **settings: object) -> dict[str, Any]:
    """Return the figures of a run."""
    found: Any = debias(method=method, out=out, settings=settings).manifest["metrics"]
    return dict(found)


def test_shipped_files_are_those_of_the_seed() -> None:
    for name, rows in data_files(0).items():
        shipped = world_path(f"letters-world/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in shipped] == rows
    assert sum(path.stat().st_size for path in world_path("letters").iterdir()) < 1_000_000
    for name, rows in shapes_files(0).items():
        shipped = world_path(f"shapes-world/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in shipped] == rows
    assert sum(path.stat().st_size for path in world_path("shapes").iterdir()) < 700_000


@pytest.mark.parametrize(("method", "settings"), [("pride", {}), ("anchored", {})])
def test_the_habit_goes_and_knowledge_shows(method: str, settings: dict[str, object], tmp_path: Path) -> None:
    found = metrics(tmp_path / "out", method, **settings)
    spread, right = found["mcq.rstd"], found["mcq.accuracy"]
    assert spread["before"]["value"] > 20
    assert spread["after"]["value"] < 0.5 * spread["before"]["value"]
    assert right["after"]["value"] > right["before"]["value"] + 0.2
    assert found["utility.kl"]["after"]["value"] < 0.05
    edited = json.loads((tmp_path / "out/surgery.json").read_text())["operations"][0]["record"].get("edited")
    if edited:
        assert [(each["layer"], each["neuron"]) for each in edited] == [(1, 7)]


def test_adding_the_right_letters_is_not_rated_as_less_bias(tmp_path: Path) -> None:
    found = metrics(tmp_path / "out", "anchored", preset="paper")
    record = json.loads((tmp_path / "out/surgery.json").read_text())["operations"][0]["record"]
    assert record["study"]["fixed"] == record["study"]["studied"] > 20
    # One letter for all is worth chance over the cyclic orders, and has the largest spread there is.
    assert found["mcq.accuracy"]["after"]["value"] == 0.25
    assert found["mcq.rstd"]["after"]["value"] > found["mcq.rstd"]["before"]["value"]


def test_stereotypes_of_the_towns_go(tmp_path: Path) -> None:
    found = metrics(tmp_path / "out", "project")
    rate, right = found["bias.stereotype_rate"], found["mcq.accuracy"]
    assert rate["before"]["value"] > 0.9
    assert 0.35 < rate["after"]["value"] < 0.65
    # What the model knows of other things stays.
    assert right["after"]["value"] == pytest.approx(right["before"]["value"], abs=0.02)


def test_eval_asks_for_letters_and_checks_gates(capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"--{name}={demo_file('letters', f'{name}.jsonl')}" for name in ("mcq", "contrast", "text")]
    words = ["eval", str(world_path("letters")), *files, "--json", "--set", "text_rows=2", "--set", "mcq_rows=8"]
    assert run([*words, "--require", "mcq.rstd>=10", "--require", "bias.stereotype_rate>=0.5"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = document["models"][0]
    assert [gate["passed"] for gate in found["gates"]] == [True, True]
    assert found["metrics"]["mcq.accuracy"]["detail"]["chosen"]["C"] > 0.5
    assert found["metrics"]["mcq.rstd"]["n"] == 8
    assert document["data"]["mcq"]["rows"] == 120
    assert run([*words, "--require", "mcq.recall_e>=0.1"]) == 2


def test_command_line_names_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = str(world_path("letters"))
    assert run(["debias", model, "--method", "pride", "-o", str(tmp_path / "out")]) == 2
    assert "--mcq is missing" in capsys.readouterr().err
    words = ["debias", "--method", "pride", "-o", str(tmp_path / "out"), "--require", "bias.stereotype_rate<=0.6"]
    assert run(words) == 2
    assert "--contrast" in capsys.readouterr().err
    assert run(["debias", "--method", "pride", "--mcq", str(tmp_path / "no.jsonl"), "-o", str(tmp_path / "out")]) == 3
    assert not (tmp_path / "out").exists()
