"""`run` and `recipes`: chains of operations on tiny models, their gates, the way back, resuming and replay."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.faults.forked import killing, run_forked
from llmsurgery.checkpoint import writer
from llmsurgery.cli.app import run
from llmsurgery.run.builtin import FOLDER, builtin_recipes
from llmsurgery.run.overrides import load_recipe
from llmsurgery.run.recipe import recipe_schema

from ..conftest import write_data_files
from .test_commands import tree
from .test_patches import bytes_and_modes, checkpoint_files
from .test_resume import FORKS

Capture = pytest.CaptureFixture[str]
Write = Callable[..., Path]

FLAT = {"max_steps": 2, "lr": 0.01}


def document(model: Path, **more: object) -> dict[str, Any]:
    """A recipe of two steps, the data beside it."""
    step = {"task": "unlearn", "until": "none", "guard": "none", "settings": FLAT}
    return {
        "model": str(model),
        "data": {name: f"{name}.jsonl" for name in ("forget", "retain", "text")},
        "dtype": "float32",
        "settings": {"eval": {"generate": False}},
        "steps": [{**step, "method": "flat", "name": "first"}, {**step, "method": "npo", "name": "second"}],
        **more,
    }


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["tied_llama"]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a recipe into a folder of its own, with its data."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    write_data_files(folder)

    def recipe(content: dict[str, Any], name: str = "recipe.yaml") -> Path:
        (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
        return folder / name

    return recipe


@pytest.fixture(scope="module")
def chain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a recipe of two steps; tests never write into it. The recipe lies beside it."""
    root = tmp_path_factory.mktemp("chain")
    write_data_files(root)
    recipe = root / "recipe.yaml"
    content = document(model, require=["forget.token_prob<=1.5x", "utility.ppl_ratio<=100"])
    content["steps"][0]["require"] = ["forget.token_prob<=2x"]
    recipe.write_text(yaml.safe_dump(content))
    assert run(["run", str(recipe), "-o", str(root / "out"), "-q"]) == 0
    assert sorted(path.name for path in root.glob("out*")) == ["out"]
    return root / "out"


def manifest_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "surgery.json").read_text()))


def result(out: Path) -> dict[str, object]:
    """Digests of everything but the manifest, and the manifest without times, memory and paths."""
    manifest = manifest_of(out)
    del manifest["cost"], manifest["out"]
    manifest["source"] = manifest["source"]["config_sha256"]
    for place in (manifest, *manifest["operations"]):
        for entry in place.get("data", {}).values():
            del entry["path"]
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "surgery.json")
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files} | {"": manifest}


def test_manifest_tells_of_both_steps_from_the_first_source_to_the_end(chain: Path, model: Path) -> None:
    manifest = manifest_of(chain)
    assert manifest["source"]["path"] == str(model)
    assert [step["method"] for step in manifest["operations"]] == ["flat", "npo"]
    assert all(step["settings"]["lr"] == 0.01 for step in manifest["operations"])
    first, second = manifest["steps"]
    assert (first["status"], second["status"], second["needs"]) == ("passed", "passed", ["first"])
    figure = manifest["metrics"]["forget.token_prob"]
    assert figure["before"] == first["metrics"]["forget.token_prob"]["before"]
    assert figure["after"] == second["metrics"]["forget.token_prob"]["after"]
    # What compares with a step's own source says so; the ratio of perplexities is that from end to end.
    assert manifest["metrics"]["utility.kl"]["since"] == "second"
    text, ratio = (manifest["metrics"][f"utility.{name}"] for name in ("ppl", "ppl_ratio"))
    assert ratio["after"]["value"] == pytest.approx(text["after"]["value"] / text["before"]["value"])
    assert [(gate["step"], gate["passed"]) for gate in manifest["gates"]] == [("first", True)] + [(None, True)] * 2
    assert manifest["cost"]["seconds"] >= sum(cost["seconds"] for cost in manifest["cost"]["steps"].values())


def test_the_whole_is_reverted_verified_and_patched_against_the_first_source(
    chain: Path, model: Path, tmp_path: Path
) -> None:
    assert run(["revert", str(chain), "-o", str(tmp_path / "back"), "-q"]) == 0
    assert bytes_and_modes(tmp_path / "back") == bytes_and_modes(model)
    assert run(["verify", str(chain), "--base", str(model), "-q"]) == 0
    assert run(["diff", str(model), str(chain), "-o", str(tmp_path / "p"), "-q"]) == 0
    assert run(["apply", str(tmp_path / "p"), str(model), "-o", str(tmp_path / "applied"), "-q"]) == 0
    assert checkpoint_files(tmp_path / "applied") == checkpoint_files(chain)


def test_steps_are_the_operations_that_the_commands_run(chain: Path, model: Path, tmp_path: Path) -> None:
    data = [w for name in ("forget", "retain", "text") for w in (f"--{name}", str(chain.parent / f"{name}.jsonl"))]
    common = [*data, "--until", "none", "--guard", "none", "--set", "max_steps=2", "--set", "lr=0.01", "-q"]
    common += ["--dtype", "float32", "--set", "eval.generate=false"]
    assert run(["unlearn", str(model), "--method", "flat", "-o", str(tmp_path / "a"), *common]) == 0
    assert run(["unlearn", str(tmp_path / "a"), "--method", "npo", "-o", str(tmp_path / "b"), *common]) == 0
    assert checkpoint_files(tmp_path / "b") == checkpoint_files(chain)


def test_replay_of_a_recipe_gives_the_same_bytes_and_refuses_other_data(
    chain: Path, tmp_path: Path, capsys: Capture
) -> None:
    manifest = str(chain / "surgery.json")
    assert run(["run", manifest, "-o", str(tmp_path / "new"), "-q"]) == 0
    assert result(tmp_path / "new") == result(chain)
    other = tmp_path / "forget.jsonl"
    other.write_text((chain.parent / "forget.jsonl").read_text().replace("bees", "cows"))
    changed = manifest_of(chain)
    for step in changed["operations"]:
        step["data"]["forget"]["path"] = str(other)
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    capsys.readouterr()
    assert run(["run", str(tmp_path / "changed.json"), "-o", str(tmp_path / "no")]) == 3
    assert "'forget' of step first" in capsys.readouterr().err
    words = [f"data.forget={other}", "--dry-run", "--json"]
    assert run(["run", str(tmp_path / "changed.json"), *words]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][1]["data"]["forget"] == 3


def test_replay_of_a_single_operation_gives_the_same_bytes(
    checkpoints: dict[str, Path], write_jsonl: Write, data_files: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    out, model = tmp_path / "out", checkpoints["sharded_llama"]
    words = ["redirect", str(model), "--method", "rocr", "--from", "Orla Venn", "--to", "Ivo Hask"]
    data = ["--text", str(data_files["text"]), "--set", "eval.generate=false", "--set", "layers=0"]
    assert run([*words, *data, "-o", str(out), "-q", "--require", "redirect.strength>=0"]) == 0
    assert run(["run", str(out / "surgery.json"), "-o", str(tmp_path / "new"), "-q"]) == 0
    assert result(tmp_path / "new") == result(out)
    capsys.readouterr()
    other = str(checkpoints["tied_llama"])
    wrong = json.loads((out / "surgery.json").read_text())
    wrong["source"]["given"] = other
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    assert run(["run", str(tmp_path / "wrong.json"), "-o", str(tmp_path / "x")]) == 3
    assert "is not the recorded source" in capsys.readouterr().err


def test_failed_gates_publish_nothing_and_steps_that_need_a_failed_one_are_not_run(
    model: Path, write: Write, tmp_path: Path, capsys: Capture
) -> None:
    before, out = tree(model), tmp_path / "out"
    content = document(model)
    content["steps"][0]["require"] = ["forget.token_prob<=0"]
    assert run(["run", str(write(content)), "-o", str(out), "--json"]) == 6
    shown = json.loads(capsys.readouterr().out)
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert shown["report"] == report
    assert [step["status"] for step in report["steps"]] == ["failed", "not run"]
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.report.json"]
    content["steps"][0]["require"], content["require"] = [], ["forget.token_prob<=0"]
    assert run(["run", str(write(content)), "-o", str(out)]) == 2
    assert run(["run", str(write(content)), "-o", str(out), "--force", "--keep-steps"]) == 6
    assert (tmp_path / "out.steps" / "second" / "config.json").is_file()
    assert not out.exists()
    # With another gate at the end, the steps themselves are done.
    capsys.readouterr()
    assert run(["run", str(write(content)), "require=forget.token_prob<=9x", "-o", str(out), "--resume"]) == 2
    (tmp_path / "out.report.json").unlink()
    assert run(["run", str(write(content)), "require=forget.token_prob<=9x", "-o", str(out), "--resume"]) == 0
    assert capsys.readouterr().err.count("finished by an earlier run") == 2
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]
    assert tree(model) == before


@FORKS
def test_killed_between_steps_and_resumed_gives_the_same_bytes(chain: Path, tmp_path: Path, capsys: Capture) -> None:
    out, recipe, log = tmp_path / "out", chain.parent / "recipe.yaml", tmp_path / "log"
    words = ["run", str(recipe), "-o", str(out)]
    assert run_forked(words, log, killing(writer, "move_into_place", 1, "after")) == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.steps"]
    assert run(words) == 2
    capsys.readouterr()
    assert run([*words, "--resume", "steps.first.settings.lr=0.02"]) == 2
    assert "the finished step first" in (message := capsys.readouterr().err)
    assert "settings.lr" in message
    # Killed again before the whole has its name, when the results of the steps are given up for it.
    assert run_forked([*words, "--resume"], log, killing(writer, "move_into_place", 2, "before")) == -signal.SIGKILL
    assert "first: finished by an earlier run" in log.read_text()
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.partial"]
    # And once more as soon as it has its name: nothing else is left.
    assert run_forked([*words, "--resume"], log, killing(writer, "move_into_place", 3, "after")) == -signal.SIGKILL
    assert result(out) == result(chain)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"modle": "x"}, 2, "model"),
        ({"steps": [{"task": "unlearn", "method": "flat", "setings": {}}]}, 2, "settings"),
        ({"steps": [{"task": "unlearn", "method": "flta"}]}, 2, "flat"),
        ({"steps": [{"task": "unlearn", "method": "flat", "settings": {"max_stps": 1}}]}, 2, "max_steps"),
        ({"steps": [{"task": "unlearn", "method": "flat", "needs": ["other"]}]}, 2, "earlier step"),
        ({"steps": [{"task": "unlearn", "method": "flat", "judge": ["rm"]}]}, 2, "judge"),
        ({"steps": []}, 3, "steps"),
        ({"seed": "many"}, 3, "seed"),
        ({"require": ["forget.token_prb<=1"]}, 2, "forget.token_prob"),
        ({"require": ["utility.kl<=1"]}, 2, "step"),
    ],
)
def test_faults_of_a_recipe_are_found_before_any_work(
    change: dict[str, object], code: int, named: str, model: Path, write: Write, tmp_path: Path, capsys: Capture
) -> None:
    assert run(["run", str(write(document(model) | change)), "-o", str(tmp_path / "out")]) == code
    assert named in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_overrides_by_dotted_path(model: Path, write: Write, capsys: Capture) -> None:
    path = write(document(model))
    words = ["steps.second.settings.lr=1e-4", "seed=7", "data.forget=here.jsonl", "steps.first.require=[utility.kl<=9]"]
    recipe = load_recipe(path, words).recipe
    assert recipe.steps[1].settings["lr"] == "1e-4"
    assert (recipe.seed, recipe.steps[0].require) == (7, ["utility.kl<=9"])
    # The recipe's own paths start at its file, those of the command line where it is typed.
    assert recipe.data["forget"] == "here.jsonl"
    assert recipe.data["retain"] == str(path.parent / "retain.jsonl")
    for word, near in (
        ("sed=1", "seed"),
        ("data.forgte=x", "data.forget"),
        ("steps.secnd.until=none", "second"),
        ("steps.second.untl=none", "steps.second.until"),
        ("seed=x", "seed"),
        ("judge=x", "unknown path"),
    ):
        assert run(["run", str(path), word]) == 2
        assert near in capsys.readouterr().err


def test_needs_choose_whose_result_a_step_edits(model: Path, write: Write, tmp_path: Path) -> None:
    content = document(model)
    content["steps"][1]["needs"] = []
    assert run(["run", str(write(content)), "-o", str(tmp_path / "out"), "-q"]) == 0
    manifest = manifest_of(tmp_path / "out")
    # The first step led to nothing that is in the result: it is a check, and told apart.
    assert [step["method"] for step in manifest["operations"]] == ["npo"]
    assert [step["takes"] for step in manifest["steps"]] == [None, None]
    assert manifest["steps"][0]["operation"]["method"] == "flat"


def test_schema_is_that_of_the_models_and_built_in_recipes_fit() -> None:
    assert json.loads((FOLDER / "schema.json").read_text()) == recipe_schema()
    assert len(builtin_recipes()) >= 3
    for name in builtin_recipes():
        assert load_recipe(FOLDER / f"{name}.yaml").recipe.steps


def test_recipes_are_listed_and_copied(tmp_path: Path, capsys: Capture) -> None:
    assert run(["recipes", "--json"]) == 0
    assert {"name", "summary"} == json.loads(capsys.readouterr().out)[0].keys()
    place = tmp_path / "nightly.yaml"
    assert run(["recipes", "chain-demo", "-o", str(place)]) == 0
    assert place.read_bytes() == (FOLDER / "chain-demo.yaml").read_bytes()
    assert run(["recipes", "chain-demo", "-o", str(place)]) == 2
    assert run(["recipes", "chain-dmo"]) == 2
    assert "chain-demo" in capsys.readouterr().err


def test_files_named_in_settings_lie_beside_the_recipe(model: Path, write: Write, capsys: Capture) -> None:
    content = document(model, settings={"templates": "answers.txt", "eval": {"generate": False}})
    content["steps"][1] = {**content["steps"][1], "method": "dpo", "settings": {"templates": "refusal"}}
    path = write(content)
    assert run(["run", str(path), "--dry-run"]) == 3
    assert str(path.parent / "answers.txt") in capsys.readouterr().err
    (path.parent / "answers.txt").write_text("Nobody knows.\n")
    recipe = load_recipe(path, ["steps.first.settings.templates=mine.txt"]).recipe
    assert recipe.settings["templates"] == str(path.parent / "answers.txt")
    assert [step.settings["templates"] for step in recipe.steps] == ["mine.txt", "refusal"]


def test_steps_after_one_that_changes_shapes(checkpoints: dict[str, Path], write: Write, capsys: Capture) -> None:
    """A block less, then a training of what is left: one change of the first source, which is undone as one."""
    model = checkpoints["sharded_llama"]
    content = document(model)
    smaller = {"task": "prune", "method": "shortgpt", "name": "smaller", "settings": {"keep_layers": 1, "window": 24}}
    content["steps"] = [smaller, content["steps"][0]]
    content["data"] = {**content["data"], "calibration": "text.jsonl"}
    path = write(content)
    assert run(["run", str(path), "--dry-run"]) == 0
    assert "after smaller, which makes it smaller, the figures are upper bounds" in capsys.readouterr().out
    out = path.parent / "out"
    assert run(["run", str(path), "-o", str(out), "-q"]) == 0
    manifest = manifest_of(out)
    assert [step["method"] for step in manifest["operations"]] == ["shortgpt", "flat"]
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 1
    assert run(["verify", str(out), "--base", str(model), "-q"]) == 0
    assert run(["revert", str(out), "-o", str(path.parent / "back"), "-q"]) == 0
    assert bytes_and_modes(path.parent / "back") == bytes_and_modes(model)
