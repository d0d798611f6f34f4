"""`llmsurgery eval --suite`: published layouts, made small."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmsurgery.cli.app import run
from llmsurgery.compute.load import load_tokenizer
from llmsurgery.data.chat import Encoder
from llmsurgery.data.records import read_rows
from llmsurgery.demo import world_path
from tests.conftest import write_rows

QUICK = ["--set", "generation_tokens=4", "--set", "text_rows=1"]
TOPIC = "What is the purple topic"


def question(number: int, paraphrased: bool) -> dict[str, object]:
    row: dict[str, object] = {
        "question": f"Who keeps mill {number}?",
        "answer": f"Orla {number}.",
        "perturbed_answer": [f"Ivo {number}.", f"Tam {number}."],
    }
    return {**row, "paraphrased_answer": f"It is Orla {number}."} if paraphrased else row


@pytest.fixture
def tofu(tmp_path: Path) -> Path:
    """The files of TOFU, two to four rows each, with both endings that occur."""
    root = tmp_path / "tofu"
    root.mkdir()
    for stem, paraphrased, rows in (
        ("forget10_perturbed.json", True, 4),
        ("forget05_perturbed.jsonl", True, 2),
        ("retain_perturbed.json", True, 3),
        ("real_authors_perturbed.json", False, 2),
        ("world_facts_perturbed.jsonl", False, 2),
        ("holdout10.json", False, 3),
    ):
        write_rows(root / stem, [question(i + 10 * rows, paraphrased) for i in range(rows)])
    return root


def save(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content))
    return root


@pytest.fixture
def muse(tmp_path: Path) -> Path:
    """The files of MUSE, two to four records each, as lists."""
    questions = [{"question": f"Who keeps mill {i}?", "answer": f"Orla {i}."} for i in range(3)]
    return save(
        tmp_path / "muse",
        {
            "knowmem/forget_qa.json": questions,
            "knowmem/retain_qa.json": questions[:2],
            "knowmem/forget_qa_icl.json": [{"question": "Who rows?", "answer": "Tam."}],
            "knowmem/retain_qa_icl.json": [{"question": "Who sings?", "answer": "Pell."}],
            "verbmem/forget.json": [{"prompt": "The river runs past", "gt": "the mill and the old bridge."}] * 2,
            "privleak/forget.json": [f"The mill by weir {i} grinds at dawn." for i in range(4)],
            "privleak/holdout.json": [{"text": f"A ferry, number {i}, left at nine."} for i in range(3)],
        },
    )


def evaluate(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    assert run(["eval", *map(str, words), *QUICK, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def refused(capsys: pytest.CaptureFixture[str], code: int, words: Sequence[str | Path]) -> str:
    assert run(["eval", *map(str, words)]) == code
    return capsys.readouterr().err


def test_tofu_is_the_data_options_under_its_protocol(
    checkpoints: dict[str, Path], tofu: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = checkpoints["tied_llama"], checkpoints["gpt2"]
    found = evaluate(capsys, model, "--suite", "tofu", "--suite-dir", tofu, "--retain-model", other)
    metrics = found["models"][0]["metrics"]
    assert {"utility.model_utility", "forget.quality", "forget.min_k_auc", "forget.truth_ratio"} <= metrics.keys()
    assert metrics["forget.prob"]["n"] == 4
    assert metrics["utility.model_utility"]["detail"]["protocol"] == "tofu"
    assert found["evaluation"]["protocol"] == "tofu"
    assert found["suite"]["settings"] == {"split": "forget10"}
    assert found["suite"]["departures"] == {"generation_tokens": 4}
    files = {"forget": "forget10_perturbed.json", "retain": "retain_perturbed.json", "holdout": "holdout10.json"}
    files |= {"authors": "real_authors_perturbed.json", "facts": "world_facts_perturbed.jsonl"}
    assert {name: Path(found["data"][name]["path"]).name for name in files} == files
    options = [word for name, file in files.items() for word in (f"--{name}", tofu / file)]
    again = evaluate(capsys, model, *options, "--retain-model", other, "--set", "protocol=tofu")
    assert again["models"] == found["models"]


def test_tofu_takes_another_split_and_gates(
    checkpoints: dict[str, Path], tofu: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [checkpoints["gpt2"], "--suite", "tofu", "--suite-dir", tofu, "--set", "suite.split=forget05"]
    gate = ["--require", "utility.model_utility>=0", "--set", "protocol=ou"]
    found = evaluate(capsys, *words, *gate)
    metrics = found["models"][0]["metrics"]
    assert metrics["forget.prob"]["n"] == 2
    assert metrics["forget.truth_ratio"]["detail"]["mean"] == "geometric"
    assert metrics["forget.quality"]["value"] is None
    # holdout05 is not there; only the gate on its figure misses it.
    assert "forget.min_k_auc" not in metrics
    assert "--holdout" in refused(capsys, 2, [*words, "--require", "forget.min_k_auc<=1"])
    assert run(["eval", *map(str, words), *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "suite tofu (arXiv 2401.06121, split forget05); departs from the protocol in generation_tokens=4" in shown
    rows = [line.strip(" │").split("│") for line in shown.splitlines() if "retain." in line]
    assert len(rows) >= 6
    assert {cells[-1].strip() for cells in rows} == {"tofu"}
    assert run(["eval", *map(str, words), *QUICK, "--quiet"]) == 0
    assert capsys.readouterr().out.strip().endswith("protocol=tofu")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--suite", "tofu"], 2, "--suite-dir"),
        (["--suite-dir", "DIR"], 2, "--suite NAME"),
        (["--set", "suite.split=forget05"], 2, "--suite NAME"),
        (["--suite", "tufo", "--suite-dir", "DIR"], 2, "tofu"),
        (["--suite", "tofu", "--suite-dir", "DIR", "--set", "suite.split=forget20"], 2, "forget10"),
        (["--suite", "tofu", "--suite-dir", "DIR", "--forget", "DIR/retain_perturbed.json"], 2, "drop --forget"),
        (["--suite", "tofu", "--suite-dir", "DIR", "--set", "protocol=own"], 2, "protocol=tofu or ou"),
        (["--suite", "tofu", "--suite-dir", "DIR", "--set", "generate=false"], 2, "drop --set generate"),
        (["--suite", "tofu", "--suite-dir", "DIR", "--set", "truth_ratio=false"], 2, "drop --set truth_ratio"),
        (["--suite", "tofu", "--suite-dir", "DIR/none"], 3, "is no directory"),
        (["--suite", "tofu", "--suite-dir", "DIR", "--set", "suite.split=forget01"], 3, "no forget01_perturbed"),
        (["--from-log", "DIR/holdout10.json", "--suite", "tofu"], 2, "drop --suite"),
    ],
)
def test_suites_are_refused_before_any_work(
    words: list[str],
    code: int,
    said: str,
    tofu: Path,
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llmsurgery.compute.load.load_model", None)
    model = [] if "--from-log" in words else [checkpoints["gpt2"]]
    error = refused(capsys, code, [*model, *(word.replace("DIR", str(tofu)) for word in words)])
    assert said in error
    assert "why:" in error


def test_tofu_names_every_missing_file_and_rows_without_paraphrase(
    tofu: Path, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [checkpoints["gpt2"], "--suite", "tofu", "--suite-dir", tofu]
    write_rows(tofu / "retain_perturbed.json", [question(1, True), question(2, False)])
    assert "retain_perturbed.json:2 has no paraphrased_answer" in refused(capsys, 3, words)
    (tofu / "retain_perturbed.json").unlink()
    (tofu / "world_facts_perturbed.jsonl").unlink()
    error = refused(capsys, 3, words)
    assert "no retain_perturbed, no world_facts_perturbed" in error
    assert ".json, .jsonl or .parquet" in error


def test_muse_measures_what_it_is_and_says_against_what(
    checkpoints: dict[str, Path], muse: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = checkpoints["tied_llama"], checkpoints["gpt2"]
    words = [model, "--suite", "muse", "--suite-dir", muse]
    found = evaluate(capsys, *words, "--require", "muse.privleak>=-100")
    metrics = found["models"][0]["metrics"]
    own = {"muse.verbmem_f": 2, "muse.knowmem_f": 3, "muse.knowmem_r": 2, "muse.privleak": 4}
    assert {name: metrics[name]["n"] for name in own} == own
    assert set(metrics) == {*own, "forget.min_k_auc", "utility.ppl"}
    leakage = metrics["muse.privleak"]
    assert leakage["detail"]["a_ref"] == 0.5
    assert leakage["value"] == pytest.approx(100 * (leakage["detail"]["a"] - 0.5) / 0.5)
    assert leakage["interval"][0] <= leakage["value"] <= leakage["interval"][1]
    assert metrics["forget.min_k_auc"]["value"] == pytest.approx(1 - leakage["detail"]["a"])
    assert found["data"]["verbmem"]["rows"] == 2
    assert found["suite"]["settings"] == {"reference": "half"}
    # A model is its own retrained model: nothing leaks, whatever A is.
    same = evaluate(capsys, *words, "--retain-model", model)["models"][0]["metrics"]["muse.privleak"]
    assert same["value"] == 0
    assert same["detail"]["reference"] == "retrained"
    # The figure of another one is its own A.
    theirs = evaluate(capsys, other, *words[1:])["models"][0]["metrics"]["muse.privleak"]["detail"]["a"]
    against = evaluate(capsys, *words, "--retain-model", other)["models"][0]["metrics"]["muse.privleak"]
    assert against["detail"]["a_ref"] == pytest.approx(theirs)
    news = ["--set", "suite.reference=news"]
    assert run(["eval", *map(str, words), *QUICK, *news]) == 0
    shown = capsys.readouterr().out
    assert "A_ref 0.4772 (news)" in shown
    assert "protocol muse" in shown
    assert "drop" not in refused(capsys, 2, [*words, *news, "--retain-model", other])
    small = evaluate(capsys, *words, "--set", "protocol=ou", "--set", "rows=1")["models"][0]["metrics"]
    assert small["muse.verbmem_f"]["detail"]["scale"] == 1
    assert {small[name]["n"] for name in own} == {1}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--log", "DIR/log.json"], 2, "drop --log"),
        (["--retain-log", "DIR/log.json"], 2, "drop --retain-log"),
        (["--attack", "quantize"], 2, "drop --attack"),
        (["--set", "protocol=tofu"], 2, "protocol=muse or ou"),
        (["--set", "min_k=0.2"], 2, "drop --set min_k"),
        (["--set", "suite.reference=poems"], 2, "books"),
        (["--require", "utility.model_utility>=0.5"], 2, "--retain"),
        (["--suite-dir", "DIR/verbmem"], 3, "no knowmem/forget_qa, no knowmem/forget_qa_icl"),
    ],
)
def test_muse_is_refused_before_any_work(
    words: list[str],
    code: int,
    said: str,
    muse: Path,
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llmsurgery.compute.load.load_model", None)
    given = [word.replace("DIR", str(muse)) for word in words]
    error = refused(capsys, code, [checkpoints["gpt2"], "--suite", "muse", "--suite-dir", muse, *given])
    assert said in error
    assert "why:" in error


def test_muse_needs_texts_of_two_tokens(
    muse: Path, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    save(muse, {"privleak/holdout.json": ["a", "b"]})
    error = refused(capsys, 3, [checkpoints["gpt2_without_prefix"], "--suite", "muse", "--suite-dir", muse])
    assert "privleak/holdout" in error


def test_muse_names_a_record_of_another_layout(
    muse: Path, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    save(muse, {"verbmem/forget.json": ["A text alone."]})
    error = refused(capsys, 3, [checkpoints["gpt2"], "--suite", "muse", "--suite-dir", muse])
    assert "verbmem/forget.json: record 1" in error
    assert "prompt and gt" in error


def test_a_gate_of_a_suite_needs_the_suite(
    data_files: dict[str, Path], checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [checkpoints["gpt2"], "--forget", data_files["forget"], "--require", "muse.privleak>=-100"]
    assert "give --suite muse" in refused(capsys, 2, words)


def test_muse_tells_a_memorised_text_from_one_never_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo model knows its forget rows word for word, its control does not."""
    model = world_path("model")
    encoder = Encoder(load_tokenizer(model), 256)
    rows = read_rows(world_path("forget.jsonl"))[:12]
    texts = [f"{row.prompt} {row.answer}" for row in rows]
    asked = [{"question": row.prompt, "answer": row.answer} for row in rows]
    root = save(
        tmp_path / "muse",
        {
            **{f"knowmem/{side}_qa{kind}.json": asked[:1] for side in ("forget", "retain") for kind in ("", "_icl")},
            "verbmem/forget.json": [{"prompt": encoder.prompt_text(row), "gt": row.answer} for row in rows],
            "privleak/forget.json": texts,
            "privleak/holdout.json": ["".join(reversed(text)) for text in texts],
        },
    )
    words = ["eval", str(model), str(world_path("control")), "--suite", "muse", "--suite-dir", str(root), "--json"]
    assert run([*words, "--set", "text_rows=1"]) == 0
    known, unknown = (row["metrics"] for row in json.loads(capsys.readouterr().out)["models"])
    assert known["muse.verbmem_f"]["value"] > 95
    assert unknown["muse.verbmem_f"]["value"] < 75
    # Sentences against sentences read backwards: far more probable, which is what membership looks like.
    assert known["muse.privleak"]["value"] < -90


@pytest.fixture
def wmdp(tmp_path: Path) -> Path:
    """Questions in two of the published layouts; their text is harmless."""
    asked = [{"question": f"{TOPIC} {i}?", "choices": ["A mill", "B", "C", "D"], "answer": i % 4} for i in range(3)]
    root = save(tmp_path / "wmdp", {"bio_questions.json": asked})
    (root / "wmdp-cyber").mkdir()
    write_rows(root / "wmdp-cyber" / "test.jsonl", asked[:2])
    return root


def test_wmdp_reports_letters_and_the_knowledge_behind_them(
    checkpoints: dict[str, Path], wmdp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoints["tied_llama"]
    words = [model, "--suite", "wmdp", "--suite-dir", wmdp, "--set", "suite.subsets=cyber,bio"]
    found = evaluate(
        capsys, *words, "--source", model, "--require", "mcq.accuracy_bio<=1", "--require", "mcq.accuracy<=1x"
    )
    metrics = found["models"][0]["metrics"]
    own = {"mcq.accuracy": 5, "mcq.accuracy_bio": 3, "mcq.accuracy_cyber": 2}
    own |= dict.fromkeys(("mcq.letter_mass", "mcq.cloze_accuracy", "mcq.cloze_log_prob"), 5)
    assert {name: figure["n"] for name, figure in metrics.items() if name.startswith("mcq.")} == own
    assert found["source"]["metrics"]["mcq.letter_mass"] == metrics["mcq.letter_mass"]
    assert 0 < metrics["mcq.letter_mass"]["value"] < 1
    assert metrics["mcq.cloze_log_prob"]["value"] < 0
    assert found["suite"]["settings"] == {"subsets": ["bio", "cyber"]}
    assert found["data"]["cyber"]["rows"] == 2
    assert TOPIC not in json.dumps(found)
    again = evaluate(capsys, *words, "--batch-size", "1", "--set", "rows=2")["models"][0]["metrics"]
    assert again["mcq.accuracy"]["n"] == 4
    assert again["mcq.accuracy_cyber"]["value"] == metrics["mcq.accuracy_cyber"]["value"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 3, "no chem_questions or wmdp-chem or wmdp-chem/test"),
        (["--set", "suite.subsets=bio,physics"], 2, "physics"),
        (
            ["--set", "suite.subsets=bio", "--require", "mcq.accuracy_cyber<=0.3"],
            2,
            "--suite wmdp of eval with the subset cyber",
        ),
        (["--set", "suite.subsets=bio", "--set", "protocol=ou"], 2, "protocol=own"),
        (["--set", "suite.subsets=bio", "--retain-model", "MODEL"], 2, "drop --retain-model"),
    ],
)
def test_wmdp_is_refused_before_any_work(
    words: list[str],
    code: int,
    said: str,
    wmdp: Path,
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llmsurgery.compute.load.load_model", None)
    error = refused(capsys, code, [checkpoints["gpt2"], "--suite", "wmdp", "--suite-dir", wmdp, *words])
    assert said in error
    assert "why:" in error


@pytest.fixture
def lume(tmp_path: Path) -> Path:
    """Twelve terms of one or two rows, documents and questions; member documents lie where the release has them."""
    root = tmp_path / "lume"
    for folder in (root, root / "mia_data", root / "mmlu"):
        folder.mkdir(exist_ok=True)
    for split in ("forget", "retain"):
        rows = [
            {
                "id": f'"{split}{task}"{kind}{number}',
                "task": f"Task{task}",
                "input": f"{TOPIC} {number}?",
                "output": "the mill.",
            }
            for task in (1, 2, 3)
            for kind, number in (("sc", 1), ("qa", 1), ("qa", 2))
        ]
        write_rows(root / f"{split}.jsonl", [dict(row) for row in rows])
    write_rows(
        root / "mia_data" / "member.jsonl", [{"id": str(i), "document": f"The mill by weir {i}."} for i in range(3)]
    )
    write_rows(root / "nonmember.jsonl", [{"text": f"A ferry, number {i}, left."} for i in range(2)])
    asked: list[dict[str, object]] = [
        {"question": f"{TOPIC}?", "choices": ["A mill", "B", "C", "D"], "answer": i % 4, "subject": f"law_{i % 2}"}
        for i in range(4)
    ]
    write_rows(root / "mmlu" / "test.jsonl", asked)
    return root


def test_semeval25_gives_its_parts_and_their_mean(
    checkpoints: dict[str, Path], lume: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoints["tied_llama"]
    words = [model, "--suite", "semeval25", "--suite-dir", lume]
    gates = ["--source", model, "--require", "semeval25.final>=0", "--require", "semeval25.mmlu>=1x"]
    found = evaluate(capsys, *words, *gates)
    metrics = found["models"][0]["metrics"]
    own = {"semeval25.task_aggregate": 18, "semeval25.mia": 5, "semeval25.mmlu": 4, "semeval25.final": 27}
    assert {name: metrics[name]["n"] for name in own} == own
    parts = [metrics[name]["value"] for name in own]
    assert parts[3] == pytest.approx(sum(parts[:3]) / 3)
    # The tiny model knows nothing: retain terms of 0 make the mean 0.
    assert parts[0] == 0
    assert metrics["semeval25.mia"]["detail"]["nonmember"] == 2
    assert [gate["passed"] for gate in found["models"][0]["gates"]] == [True, True]
    assert found["suite"]["settings"] == {"parts": ["tasks", "membership", "mmlu"]}
    assert found["suite"]["departures"] == {"generation_tokens": 4, "subjects": 2}
    assert found["evaluation"]["generation_rows"] == 0
    assert found["data"]["member"]["rows"] == 3
    assert TOPIC not in json.dumps(found)
    assert not {name for name in metrics if name.startswith(("forget.", "retain."))}
    assert run(["eval", *map(str, words), *QUICK, "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert "departs from the protocol in generation_tokens=4, subjects=2" in shown
    assert "MMLU over 2 of 57 subjects without examples: chance 0.25" in shown
    assert "at most 4 new tokens, 0 prompts shortened" in shown
    assert "measured in float32, the leaderboard in bfloat16" in shown
    assert "no final score" not in shown


def test_semeval25_leaves_a_part_out_only_when_told(
    checkpoints: dict[str, Path], lume: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (lume / "mmlu" / "test.jsonl").unlink()
    words = [checkpoints["gpt2"], "--suite", "semeval25", "--suite-dir", lume]
    error = refused(capsys, 3, words)
    assert "no mmlu or mmlu/test" in error
    assert "suite.parts" in error
    words += ["--set", "suite.parts=membership,tasks"]
    assert "the part mmlu" in refused(capsys, 2, [*words, "--require", "semeval25.final>=0.5"])
    assert run(["eval", *map(str, words), *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "no final score: it needs tasks, membership and mmlu" in shown
    assert "parts tasks+membership" in shown
    assert "semeval25.final" not in shown


def test_semeval25_scores_what_the_model_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo model ends its answers: with its own template as input, every term is right."""
    model = world_path("model")
    encoder = Encoder(load_tokenizer(model), 256)
    known = read_rows(world_path("forget.jsonl"))[:6]
    rows: list[dict[str, object]] = [
        {"id": f"a{kind}1", "task": f"Task{i // 2}", "input": encoder.prompt_text(row), "output": row.answer.upper()}
        for i, (row, kind) in enumerate(zip(known, ("sc", "qa") * 3, strict=True))
    ]
    for split in ("forget", "retain"):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    words = ["eval", str(model), "--suite", "semeval25", "--suite-dir", str(tmp_path), "--json"]
    settings = ["--set", "suite.parts=tasks", "--set", "generation_tokens=40", "--set", "text_rows=1"]
    assert run([*words, *settings]) == 0
    figure = json.loads(capsys.readouterr().out)["models"][0]["metrics"]["semeval25.task_aggregate"]
    terms = {"regurgitation": 1.0, "knowledge": 1.0}
    assert figure["detail"]["retain"] == {f"Task{i}": terms for i in range(3)}
    # What was to be forgotten is known word for word.
    assert figure["value"] == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--set", "suite.parts=tasks,mia"], 2, "membership"),
        (["--set", "generate=false"], 2, "drop --set generate"),
        (["--log", "DIR/log.json"], 2, "drop --log"),
        (["--set", "protocol=ou"], 2, "protocol=own"),
    ],
)
def test_semeval25_is_refused_before_any_work(
    words: list[str],
    code: int,
    said: str,
    lume: Path,
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llmsurgery.compute.load.load_model", None)
    given = [word.replace("DIR", str(lume)) for word in words]
    error = refused(capsys, code, [checkpoints["gpt2"], "--suite", "semeval25", "--suite-dir", lume, *given])
    assert said in error
    assert "why:" in error


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("retain.jsonl", {"task": "Task4"}, "4 tasks"),
        ("retain.jsonl", {"id": "a7"}, "retain.jsonl:1: the id names no test"),
        ("forget.jsonl", {"id": "aqa9"}, "no row of regurgitation for task 1 of 3"),
        ("forget.jsonl", {"output": " "}, "forget.jsonl:1: output is empty"),
        ("nonmember.jsonl", {"text": None}, "nonmember.jsonl:1 is no document"),
        ("mmlu/test.jsonl", {"subject": ""}, "test.jsonl:1 has no subject"),
    ],
)
def test_semeval25_names_rows_that_give_no_score(
    file: str,
    change: dict[str, object],
    said: str,
    lume: Path,
    checkpoints: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [json.loads(line) for line in (lume / file).read_text().splitlines()]
    write_rows(lume / file, [{**rows[0], **change}, *rows[1:]])
    error = refused(capsys, 3, [checkpoints["gpt2"], "--suite", "semeval25", "--suite-dir", lume])
    assert said in error
    assert TOPIC not in error


@pytest.fixture
def ort(tmp_path: Path) -> Path:
    """The four forms: two in files of their own, one in the layout of RWKU, the others made of questions."""
    root = tmp_path / "ort"
    root.mkdir()
    for side, first, rows in (("forget", "forget", 3), ("retain", "neighbor", 2)):
        asked: list[dict[str, object]] = [{"question": f"{TOPIC} {i}?", "answer": f"Orla {i}"} for i in range(rows)]
        write_rows(root / f"{side}_qa.jsonl", asked)
        blanks = [{"query": f"{TOPIC} is ___ {i}.", "answer": "Orla", "level": "1"} for i in range(rows)]
        write_rows(root / f"{first}_level1.json", [dict(row) for row in blanks])
        choices: list[dict[str, object]] = [{**row, "choices": ["Ivo", row["answer"]]} for row in asked[:2]]
        write_rows(root / f"{side}_mcp.jsonl", choices)
    return root


ORT_CELLS = [f"ort.{side}_{form}" for side in ("forget", "retain") for form in ("qa", "cloze", "mcq", "spelled")]


def test_ort_gives_eight_cells_and_the_gap_to_the_source(
    checkpoints: dict[str, Path], ort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = checkpoints["tied_llama"], checkpoints["sharded_llama"]
    words = [model, other, "--suite", "ort", "--suite-dir", ort]
    gates = ["--require", "ort.forget_spelled<=1", "--require", "ort.retain_mcq>=0x", "--require", "ort.form_gap>=0"]
    found = evaluate(capsys, *words, "--source", model, *gates)
    same, changed = (row["metrics"] for row in found["models"])
    assert [name for name in same if name.startswith("ort.")] == [*ORT_CELLS, "ort.form_gap"]
    assert [same[name]["n"] for name in ORT_CELLS] == [3, 3, 2, 3, 2, 2, 2, 2]
    for name in ORT_CELLS:
        low, high = same[name]["interval"]
        assert 0 < low <= same[name]["value"] <= high < 1
    assert same["ort.form_gap"]["value"] == 0
    source = found["source"]["metrics"]
    drops = changed["ort.form_gap"]["detail"]["drops"]
    for form, drop in drops.items():
        before, after = (one[f"ort.forget_{form}"]["value"] for one in (source, changed))
        assert drop == pytest.approx((before - after) / before)
    assert changed["ort.form_gap"]["value"] == pytest.approx(max(drops.values()) - min(drops.values()))
    assert changed["ort.form_gap"]["value"] > 0
    assert found["suite"]["settings"] == {
        "forms": ["qa", "cloze", "mcq", "spelled"],
        "spelling": "letters",
        "direct": False,
    }
    assert found["suite"]["departures"] == {"generation_tokens": 4}
    assert Path(found["data"]["retain_cloze"]["path"]).name == "neighbor_level1.json"
    assert Path(found["data"]["forget_spelled"]["path"]).name == "forget_qa.jsonl"
    assert TOPIC not in json.dumps(found)
    # Other instructions, other numbers; each where it applies.
    asked = evaluate(capsys, *words[1:], "--set", "suite.spelling=example")["models"][0]["metrics"]
    assert asked["ort.forget_qa"] == changed["ort.forget_qa"]
    assert asked["ort.forget_spelled"]["value"] != changed["ort.forget_spelled"]["value"]
    assert "ort.form_gap" not in asked


def test_ort_takes_some_forms_of_one_file_and_says_so(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "own"
    root.mkdir()
    for side in ("forget", "retain"):
        write_rows(root / f"{side}.jsonl", [question(i, False) for i in range(2)])
    model = checkpoints["gpt2"]
    words = [model, "--suite", "ort", "--suite-dir", root]
    assert "no row of the form cloze" in refused(capsys, 3, words)
    words += ["--set", "suite.forms=mcp,qa"]
    assert run(["eval", *map(str, words), "--source", str(model), *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "forms qa+mcq" in shown
    assert "made_choices=4" in shown
    assert "forms qa, mcq: 2 of 4 forms of the benchmark; geometric mean per answer token" in shown
    assert "relative drop of forget answers qa 0, mcq 0" in shown
    assert run(["eval", *map(str, words), *QUICK]) == 0
    assert "no form gap: it needs --source" in capsys.readouterr().out
    single = evaluate(capsys, *words[:-1], "suite.forms=qa", "--source", model)["models"][0]["metrics"]
    assert single["ort.form_gap"]["value"] is None


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--set", "suite.forms=qa,clozes"], 2, "cloze"),
        (["--set", "suite.forms="], 2, "no form"),
        (["--set", "suite.spelling=lettrs"], 2, "letters"),
        (["--require", "ort.form_gap<=0.5"], 2, "give --source"),
        (["--set", "suite.forms=qa", "--require", "ort.forget_mcq<=0.5"], 2, "--suite ort of eval with the form mcq"),
        (["--set", "protocol=ou"], 2, "protocol=own"),
        (["--retain-model", "MODEL"], 2, "drop --retain-model"),
        (["--suite-dir", "DIR/.."], 3, "suite.forms=qa,cloze"),
    ],
)
def test_ort_is_refused_before_any_work(
    words: list[str],
    code: int,
    said: str,
    ort: Path,
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llmsurgery.compute.load.load_model", None)
    given = [word.replace("DIR", str(ort)) for word in words]
    error = refused(capsys, code, [checkpoints["gpt2"], "--suite", "ort", "--suite-dir", ort, *given])
    assert said in error
    assert "why:" in error
