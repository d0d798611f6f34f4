"""Several recipes side by side: how recipes are read, which are on the front, and what a comparison leaves."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from llmsurgery.cli.app import run
from llmsurgery.errors import InputError, SurgeryError, UsageError
from llmsurgery.run import compare as compare_module
from llmsurgery.run.compare import Recipe, pareto_front, read_recipes


def test_recipes_are_read_from_words_and_files(tmp_path: Path) -> None:
    file = tmp_path / "strong.yaml"
    file.write_text("method: flat\nsettings: {lr: 0.001, roles: [attn.q, attn.o]}\nguard: none\nseed: 3\n")
    found = read_recipes(["flat", "flat:lr=1e-3:roles=attn.q,attn.o:guard=none", str(file), "flat"])
    assert [recipe.label for recipe in found] == [
        "flat",
        "flat:lr=1e-3:roles=attn.q,attn.o:guard=none",
        "strong",
        "flat-2",
    ]
    assert found[1].settings == {"lr": "1e-3", "roles": "attn.q,attn.o"}
    assert (found[1].guard, found[1].until, found[1].seed) == ("none", None, None)
    words = ["--method", "flat", "--set", "lr=0.001", "--set", "roles=attn.q,attn.o", "--guard", "none", "--seed", "3"]
    assert found[2].words() == words


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("flat:lr", UsageError, "NAME=VALUE"),
        ("flat:seed=x", UsageError, "seed"),
        ("missing.yaml", InputError, "missing.yaml"),
        ("method: flat\nsetings: {}\n", UsageError, "settings"),
        ("settings: {}\n", InputError, "names no method"),
        ("method: flat\nsettings: 3\n", InputError, "mapping"),
        ("method: [\n", InputError, "not YAML"),
    ],
)
def test_bad_recipes_are_refused(text: str, error: type[SurgeryError], message: str, tmp_path: Path) -> None:
    if "\n" in text:
        (tmp_path / "r.yaml").write_text(text)
        text = str(tmp_path / "r.yaml")
    with pytest.raises(error) as caught:
        read_recipes([text])
    assert message in str(caught.value)


def row(label: str, forget: float, retain: float | None, ratio: float = 1.0) -> dict[str, Any]:
    shares = {"forget.token_prob": forget, "utility.ppl_ratio": ratio}
    return {"label": label, "shares": shares if retain is None else {**shares, "retain.token_prob": retain}}


def test_front_is_what_nothing_beats() -> None:
    rows = [row("a", 0.2, 0.9), row("b", 0.1, 0.5), row("c", 0.3, 0.8), row("d", 0.2, 0.9), {"label": "failed"}]
    assert pareto_front(rows) == ["a", "b", "d"]
    # Without retain rows the perplexity ratio takes their place, less being better.
    assert pareto_front([row("a", 0.2, None, 1.1), row("b", 0.2, None, 1.3), row("c", 0.1, None, 1.2)]) == ["a", "c"]


def test_a_run_in_a_process_of_its_own_gives_its_exit_code_and_document() -> None:
    code, listing = compare_module._call(["methods", "flat", "--json"])
    assert code == 0
    assert listing[0]["name"] == "flat"  # type: ignore[index]
    code, document = compare_module._call(["methods", "flatt", "--json"])
    assert code == document["exit_code"] == 2
    assert "flatt" in document["error"]["what"]
    # Not a word on stdout: what it said last is the reason.
    code, document = compare_module._call(["eval", "--nothing"])
    assert code == 2
    assert document["error"]["kind"] == "killed"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs of a comparison in this process, since each start takes seconds; the search has one of its own.

    Gives the first words of what was run.
    """
    called: list[str] = []

    def call(words: list[str]) -> tuple[int, dict[str, Any]]:
        called.append(words[0])
        with redirect_stdout(StringIO()) as printed:
            code = run(words)
        return code, json.loads(printed.getvalue())

    monkeypatch.setattr(compare_module, "_call", call)
    return called


def test_comparison_runs_every_recipe_and_leaves_table_and_picture(
    checkpoints: dict[str, Path],
    data_files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    in_process: list[str],
) -> None:
    pytest.importorskip("matplotlib")
    files = [word for name, path in data_files.items() for word in (f"--{name}", str(path))]
    fast = "eval.generate=false:guard=none:until=none:max_steps=3:lr=0.01"
    recipes = [f"flat:{fast}", "flat:guard=none:until=none:lr=0:eval.generate=false"]
    words = ["compare", *recipes, "--model", str(checkpoints["tied_llama"]), *files, "-o", str(tmp_path / "out")]
    # The last recipe changes nothing: it is a row with its error, and the exit code of the whole.
    assert run([*words, "--json"]) == 5
    document = json.loads(capsys.readouterr().out)
    assert [found["exit_code"] for found in document["rows"]] == [0, 5]
    assert in_process == ["unlearn", "unlearn"]
    assert document["rows"][1]["error"]["kind"] == "no effect"
    assert document["rows"][0]["cost"]["rss_bytes"] > 0
    assert document["front"] == [document["rows"][0]["label"]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.json", "compare.md", "compare.svg"]
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == document
    table = (tmp_path / "out" / "compare.md").read_text()
    assert table.count("\n| ") == 3
    assert "exit 5" in table
    assert run(words) == 2, "an output that exists is refused"


def test_unseen_rows_and_attacks_are_columns(
    checkpoints: dict[str, Path],
    data_files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    in_process: list[str],
) -> None:
    unseen, control = tmp_path / "unseen.jsonl", tmp_path / "control.jsonl"
    unseen.write_text(json.dumps({"question": "Who wrote it?", "answer": "Somebody else did"}) + "\n")
    control.write_text(json.dumps({"question": "Who mends the nets?", "answer": "Pell Orrin does."}) + "\n")
    recipe = "flat:eval.generate=false:guard=none:until=none:max_steps=20:lr=0.02"
    files = ["--forget", str(data_files["forget"]), "--retain", str(data_files["retain"]), "--unseen", str(unseen)]
    words = ["compare", recipe, *files, "-o", str(tmp_path / "out"), "--keep", "--json"]
    assert run(words) == 2, "the demo has none to spare"
    assert "--model" in json.loads(capsys.readouterr().out)["error"]["fix"]
    words += ["--model", str(checkpoints["tied_llama"])]
    given = {"score": "token_prob", "sizes": 2, "epochs": 1, "rank": 2, "modes": "subset", "on_source": False}
    settings = [f"attack.relearn.{name}={str(value).lower()}" for name, value in given.items()]
    words += [word for setting in [*settings, "attack.known=0"] for word in ("--set", setting)]
    assert run([*words, "--control", str(control)]) == 2, "no attack is given"
    words += ["--attack", "relearn", "--control", str(control)]
    assert run([*words, "--set", "lr=1"]) == 2, "of no recipe"
    assert "METHOD:NAME=VALUE" in capsys.readouterr().out
    assert run(words) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert in_process == ["eval", "unlearn", "eval", "eval"], "before, the run, its attack, and after"
    result = tmp_path / "out" / row["label"]
    values = []
    for model in (checkpoints["tied_llama"], result):
        assert run(["eval", str(model), "--retain", str(unseen), "--set", "generate=false", "--json"]) == 0
        values.append(json.loads(capsys.readouterr().out)["models"][0]["metrics"]["retain.token_prob"]["value"])
    assert row["shares"]["unseen.token_prob"] == pytest.approx(values[1] / values[0], abs=1e-9)
    found = row["attacks"]["relearn"]
    assert found["verdict"]
    assert found["settings"]["score"] == "token_prob"
    assert found["control_rows"] == {"n": 0, "left_out": 1}, "known=0 leaves no unknown row"
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "unseen kept" in table
    assert "relearn recovery" in table


def test_wrong_recipe_is_refused_before_the_first_run(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "flat", "flat:lrr=1", "--model", str(checkpoints["tied_llama"])]
    assert run([*words, "--forget", str(data_files["forget"]), "-o", str(tmp_path / "out")]) == 2
    assert "lr" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_labels_make_words() -> None:
    assert Recipe("x", "flat", {"a": True}, until="none").words() == [
        "--method",
        "flat",
        "--set",
        "a=true",
        "--until",
        "none",
    ]
