"""The command line on real files: streams, JSON, outputs, gates."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from llmsurgery.cli.app import run

FAST = ["--set", "max_steps=3", "--set", "lr=0.01", "--until", "none", "--guard", "none"]


def unlearn(model: Path, data: dict[str, Path], out: Path, *more: str) -> list[str]:
    files = [word for name, path in data.items() for word in (f"--{name}", str(path))]
    return ["unlearn", str(model), "--method", "flat", *files, "-o", str(out), *FAST, *more]


def tree(root: Path) -> dict[str, tuple[str, int, int]]:
    return {
        str(path.relative_to(root)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mode,
            path.stat().st_mtime_ns,
        )
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def model(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["tied_llama"]


def test_json_is_one_manifest_and_holds_no_forget_text(
    model: Path, data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(unlearn(model, data_files, out, "--json")) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == json.loads((out / "surgery.json").read_text())
    assert manifest["source"]["path"] == str(model)
    assert manifest["out"] == str(out)
    assert manifest["export"] == "plain"
    assert manifest["data"]["forget"]["rows"] == 3
    assert manifest["data"]["forget"]["sha256"] == hashlib.sha256(data_files["forget"].read_bytes()).hexdigest()
    for name in ("forget.token_prob", "forget.prob", "forget.rouge_l", "retain.prob", "utility.ppl", "utility.kl"):
        figure = manifest["metrics"][name]
        assert {"before", "after", "direction"} == figure.keys()
        assert figure["after"]["n"] > 0
    settings = manifest["operations"][0]["settings"]
    assert settings["lr"] == 0.01
    assert settings["divergence"] == "tv"
    # What was to be forgotten must not live on in the result's own files.
    for path in out.rglob("*"):
        if path.is_file():
            assert b"Orla Venn" not in path.read_bytes(), path


def test_people_see_tables_and_the_place_of_the_checkpoint(
    model: Path, data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(unlearn(model, data_files, tmp_path / "out")) == 0
    shown = capsys.readouterr()
    for word in ("forget.token_prob", "coverage", "attn.q", "Who keeps the bees?", f"checkpoint: {tmp_path / 'out'}"):
        assert word in shown.out
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n---")
    assert "forget.token_prob" in card


def test_quiet_prints_the_path_alone(
    model: Path, data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(unlearn(model, data_files, tmp_path / "out", "-q")) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'out'}\n"
    assert shown.err == ""


def test_failed_gate_leaves_a_report_and_no_checkpoint(
    model: Path, data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(model)
    out = tmp_path / "out"
    code = run(unlearn(model, data_files, out, "--json", "--require", "utility.ppl_ratio<=0.0001"))
    assert code == 6
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == 6
    assert document["error"]["kind"] == "gate"
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["gates"][0]["passed"] is False
    assert not out.exists()
    assert not (tmp_path / "out.partial").exists()
    assert tree(model) == before
    # The report is not replaced unasked; a success later takes it away.
    gate = ["--require", "utility.ppl_ratio<=0.0001"]
    assert run(unlearn(model, data_files, out, *gate)) == 2
    assert run(unlearn(model, data_files, out, "--force", "--keep-partial", *gate)) == 6
    assert (tmp_path / "out.partial" / "model.safetensors").is_file()
    assert run(unlearn(model, data_files, out, "--force", "-q")) == 0
    assert not (tmp_path / "out.report.json").exists()


def test_gates_that_hold_are_recorded(
    model: Path, data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = ["--require", "forget.token_prob<=100x", "--require", "utility.kl>=0"]
    assert run(unlearn(model, data_files, tmp_path / "out", "--json", *gates)) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert [gate["passed"] for gate in manifest["gates"]] == [True, True]
    before = manifest["metrics"]["forget.token_prob"]["before"]["value"]
    assert manifest["gates"][0]["limit"] == pytest.approx(100 * before)


def test_until_stops_early_or_says_that_it_was_not_reached(
    model: Path, data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for bound, stopped, steps in (("<=100x", "until", 1), ("<=0", "max_steps", 3)):
        out = tmp_path / stopped
        assert run(unlearn(model, data_files, out, "--json", "--until", f"forget.prob{bound}")) == 0
        shown = capsys.readouterr()
        record = json.loads(shown.out)["operations"][0]["record"]
        assert (record["stopped"], record["steps"]) == (stopped, steps)
        assert ("was not reached" in shown.err) == (stopped == "max_steps")


def test_link_shares_untouched_files_and_never_writes_through(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    source = checkpoints["sharded_llama"]
    before = tree(source)
    out = tmp_path / "out"
    assert run(unlearn(source, data_files, out, "-q", "--link", "--set", "roles=mlp.down", "--set", "layers=0")) == 0
    assert tree(source) == before
    changed = [
        path.name
        for path in out.iterdir()
        if path.name in before and path.read_bytes() != (source / path.name).read_bytes()
    ]
    assert len([name for name in changed if name.endswith(".safetensors")]) == 1


def test_generated_names_do_not_collide(
    model: Path, data_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for word in unlearn(model, data_files, Path("unused"), "-q") if word not in ("-o", "unused")]
    assert run(words) == 0
    assert run(words) == 0
    assert sorted(path.name for path in (tmp_path / "llmsurgery-out").iterdir()) == ["unlearn-flat", "unlearn-flat-002"]


def test_config_file_and_set(
    model: Path, data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flat.yaml").write_text("divergence: kl\nrank: 2\n")
    words = unlearn(model, data_files, tmp_path / "out", "--json", "--config", str(tmp_path / "flat.yaml"))
    assert run([*words, "--set", "rank=3"]) == 0
    settings = json.loads(capsys.readouterr().out)["operations"][0]["settings"]
    assert (settings["divergence"], settings["rank"]) == ("kl", 3)


def test_eval_compares_with_the_source(
    model: Path, data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(unlearn(model, data_files, out, "--json")) == 0
    manifest = json.loads(capsys.readouterr().out)
    files = [word for name, path in data_files.items() for word in (f"--{name}", str(path))]
    assert run(["eval", str(out), "--source", str(model), *files, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    for name, figure in document["models"][0]["metrics"].items():
        assert figure["value"] == pytest.approx(manifest["metrics"][name]["after"]["value"], abs=1e-6), name
    assert document["source"]["metrics"]["forget.prob"]["value"] == pytest.approx(
        manifest["metrics"]["forget.prob"]["before"]["value"], abs=1e-6
    )
    assert run(["eval", str(model), *files, "--require", "utility.kl<=1"]) == 2
    assert run(["eval", str(model), *files, "--require", "forget.prob<=-1"]) == 6
    assert run(["eval", str(model), str(out), *files]) == 0
    assert "forget.rouge_l" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tied_llama", "sharded_llama", "gpt2", "gpt2_without_prefix"])
def test_inspect_describes_every_tensor(
    name: str, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(checkpoints[name]), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["other"] == []
    assert document["parameters"] == sum(row["parameters"] for row in document["roles"].values())
    assert document["methods"]["flat"]["tensors"] > 0
    assert run(["inspect", str(checkpoints[name])]) == 0
    assert "roles by default" in capsys.readouterr().out


def test_methods_lists_what_scripts_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert {"name", "task", "paper", "needs", "export"} <= listing[0].keys()
    assert run(["methods", "flat", "--json"]) == 0
    (flat,) = json.loads(capsys.readouterr().out)
    names = {setting["name"]: setting for setting in flat["hyperparameters"]}
    assert names["divergence"]["default"] == "tv"
    assert all(setting["help"] for setting in names.values())
    assert "paper" in flat["presets"]


def test_dry_run_writes_nothing(
    model: Path, data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(unlearn(model, data_files, tmp_path / "a" / "out", "--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tensors"] == 14
    assert plan["bytes_to_rewrite"] > 0
    assert not (tmp_path / "a").exists()


def test_demo_runs_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # Trained as it is without any option; fewer figures.
    few = ["eval.generation_rows=8", "eval.truth_ratio=false", "eval.text_rows=8"]
    words = ["unlearn", "--method", "flat", *(word for setting in few for word in ("--set", setting))]
    assert run([*words, "--json", "--require", "forget.token_prob<=0.25x"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["metrics"]["forget.token_prob"]["before"]["value"] > 0.9
    assert manifest["operations"][0]["record"]["stopped"] == "until"
    assert (tmp_path / "llmsurgery-out" / "unlearn-flat" / "model.safetensors").is_file()
