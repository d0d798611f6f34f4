"""`--method auto`: which recipes are tried, what counts as the best, and what an interruption leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmsurgery import unlearn
from llmsurgery.cli.app import run
from llmsurgery.errors import GateError, SurgeryError, UsageError
from llmsurgery.evaluate.gates import Gate
from llmsurgery.run import search as search_module
from llmsurgery.run.compare import Recipe
from llmsurgery.run.request import Request
from llmsurgery.run.search import Candidate, recipe_of, shortfall

pytest.importorskip("optuna")
FAST = {"max_steps": 2, "eval.generate": False, "eval.truth_ratio": False, "eval.text_rows": 4, "guard.prompts": 8}


def test_parameters_make_a_recipe() -> None:
    candidates = {"flat": Candidate(1e-3, True), "npo": Candidate(2e-3, False), "key-space": Candidate(None, False)}
    values = {"method": "flat", "lr_factor": 0.5, "goal": 0.1, "guard_weight": 2.0}
    found = recipe_of(values, candidates, {"rank": 4})
    assert found == Recipe(
        "flat", "flat", {"rank": 4, "lr": 5e-4, "guard.weight": 2.0}, None, "forget.token_prob<=0.1x"
    )
    assert recipe_of({**values, "method": "npo"}, candidates, {}).settings == {"lr": 1e-3}
    assert recipe_of({"method": "key-space"}, candidates, {}) == Recipe("key-space", "key-space")


@pytest.mark.parametrize(
    ("gate", "value", "expected"),
    [
        (Gate("retain.token_prob", ">=", 0.9, True), 0.45, 0.0),
        (Gate("retain.token_prob", ">=", 0.9, True), 0.225, 0.5),
        (Gate("utility.ppl", "<=", 2.0, False), 2.5, 0.25),
        (Gate("utility.ppl", "<=", 2.0, False), 1.0, -0.5),
        (Gate("utility.ppl", "<=", 2.0, False), 9.0, 1.0),
        (Gate("utility.ppl", "<=", 2.0, False), None, 1.0),
    ],
)
def test_shortfall_is_a_share_of_the_limit(gate: Gate, value: float | None, expected: float) -> None:
    figure = {"before": {"value": 0.5}, "after": {"value": value}}
    assert shortfall(gate, figure) == pytest.approx(expected)


class Landscape:
    """Stands for runs: forgetting costs retain probability, and the guard pays some of it back."""

    def __init__(self) -> None:
        self.seen: list[Recipe] = []
        self.dies_at: int | None = None

    def __call__(self, recipe: Recipe, request: Request, out: Path) -> dict[str, Any]:
        if len(self.seen) == self.dies_at:
            raise KeyboardInterrupt
        self.seen.append(recipe)
        if recipe.method == "graddiff":
            return {"exit_code": 9, "error": {"what": "training diverged"}}
        goal = float(str(recipe.until).split("<=")[1].rstrip("x"))
        guard = float(str(recipe.settings["guard.weight"]))
        retain = 1 - 0.2 * (1 - goal) / guard
        metrics = {
            "forget.token_prob": {"before": {"value": 0.5}, "after": {"value": 0.5 * goal}},
            "retain.token_prob": {"before": {"value": 0.5}, "after": {"value": 0.5 * retain}},
            "utility.ppl_ratio": {"before": {"value": 1.0}, "after": {"value": 1.0}},
        }
        held = retain >= 0.9
        return {"exit_code": 0, "metrics": metrics} if held else {"exit_code": 6, "report": {"metrics": metrics}}


@pytest.fixture
def landscape(monkeypatch: pytest.MonkeyPatch) -> Landscape:
    made = Landscape()
    monkeypatch.setattr(search_module, "run_recipe", made)
    return made


def auto(out: Path, **options: Any) -> Any:
    settings = {**FAST, "methods": "flat,graddiff", "trials": 8, **options.pop("settings", {})}
    return unlearn(method="auto", out=out, settings=settings, **options)


def test_best_trial_within_the_gates_is_run_to_the_output(landscape: Landscape, tmp_path: Path) -> None:
    # The final run is real, and two steps of it hold these gates.
    outcome = auto(tmp_path / "out", require=["retain.token_prob>=0.9x"])
    report = json.loads((tmp_path / "out.search.json").read_text())
    assert len(report["trials"]) == len(landscape.seen) == 8
    assert {recipe.method for recipe in landscape.seen[:2]} == {"flat", "graddiff"}, "each begins with its own strength"
    held = [row for row in report["trials"] if row["exit_code"] == 0]
    best = report["trials"][report["best"]]
    assert best["forget_kept"] == min(row["forget_kept"] for row in held)
    assert any(row["exit_code"] == 9 and row["error"] == "training diverged" for row in report["trials"])
    operation = outcome.manifest["operations"][0]
    assert operation["settings"]["lr"] == pytest.approx(landscape.seen[report["best"]].settings["lr"])
    assert outcome.out == tmp_path / "out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.search.json"]


def test_interrupted_search_goes_on(landscape: Landscape, tmp_path: Path) -> None:
    auto(tmp_path / "whole", require=["retain.token_prob>=0.9x"])
    whole, landscape.seen = list(landscape.seen), []
    landscape.dies_at = 5
    with pytest.raises(KeyboardInterrupt):
        auto(tmp_path / "out", require=["retain.token_prob>=0.9x"])
    assert not (tmp_path / "out").exists()
    landscape.dies_at = None
    with pytest.raises(UsageError, match="another one"):
        auto(tmp_path / "out", seed=1, resume=True, require=["retain.token_prob>=0.9x"])
    auto(tmp_path / "out", resume=True, require=["retain.token_prob>=0.9x"])
    assert landscape.seen == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.search.json", "whole", "whole.search.json"]


def test_no_trial_within_the_gates_is_an_error_with_a_report(landscape: Landscape, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="none of 3 trials") as caught:
        auto(tmp_path / "out", settings={"trials": 3, "guard_weights": "0.1,0.2"})
    assert "flat" in caught.value.why
    assert [path.name for path in tmp_path.iterdir()] == ["out.search.json"]
    assert json.loads((tmp_path / "out.search.json").read_text())["best"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dry_run": True}, "dry-run"),
        ({"until": "forget.token_prob<=0.1x"}, "until"),
        ({"settings": {"lr": 0.1}}, "chooses lr"),
        ({"settings": {"goals": "0.5,0.1"}}, "range"),
        ({"settings": {"methods": "flatt"}}, "flatt"),
        ({"settings": {"trials": 0}}, "trials"),
    ],
)
def test_wrong_requests_are_refused(
    options: dict[str, Any], message: str, landscape: Landscape, tmp_path: Path
) -> None:
    with pytest.raises(SurgeryError) as caught:
        auto(tmp_path / "out", **options)
    assert message in str(caught.value)
    assert not landscape.seen
    assert not list(tmp_path.iterdir())


def test_search_with_real_runs(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [word for name, path in data_files.items() for word in (f"--{name}", str(path))]
    given = {"methods": "flat", "trials": 1, "max_steps": 2, "eval.generate": "false"}
    words = [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    words += ["--require", "utility.ppl_ratio<=5", "--guard", "none", "-o", str(tmp_path / "out"), "--json"]
    assert run(["unlearn", str(checkpoints["tied_llama"]), "--method", "auto", *files, *words]) == 0
    manifest = json.loads(capsys.readouterr().out)
    row = json.loads((tmp_path / "out.search.json").read_text())["trials"][0]
    assert row["metrics"]["forget.token_prob"] == manifest["metrics"]["forget.token_prob"]["after"]["value"]
    assert manifest["gates"][0]["passed"]
