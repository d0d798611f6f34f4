"""The orchestrator on odd but valid models and requests; each case was once wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsurgery import SurgeryError, unlearn
from llmsurgery.cli.app import run
from llmsurgery.compute.progress import Silent
from llmsurgery.errors import NoEffectError, UsageError
from llmsurgery.evaluate.figures import Measurement
from llmsurgery.evaluate.intervals import Figure
from llmsurgery.run.notices import Notices, warn_of_spill

FAST = {"max_steps": 2, "lr": 0.01, "eval.generate": False}


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A private copy of a one-file checkpoint with changed tensors or config."""

    def make(name: str, change: Callable[[dict[str, torch.Tensor]], None] | None = None, **config: object) -> Path:
        root = Path(shutil.copytree(checkpoints[name], tmp_path / "model"))
        file = root / "model.safetensors"
        if change:
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, metadata={"format": "pt"})
        settings = json.loads((root / "config.json").read_text())
        (root / "config.json").write_text(json.dumps(settings | config))
        return root

    return make


def flat(model: Path, data: dict[str, Path], out: Path, **settings: object) -> dict[str, Any]:
    until = settings.pop("until", "none")
    outcome = unlearn(model, method="flat", out=out, until=str(until), guard="none", settings=FAST | settings, **data)
    return dict(outcome.manifest)


def test_negative_zeros_are_no_effect(copy: Callable[..., Path], data_files: dict[str, Path], tmp_path: Path) -> None:
    def negate(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"].zero_().neg_()

    with pytest.raises(NoEffectError):
        flat(copy("tied_llama", negate), data_files, tmp_path / "out", lr=0)


def test_float64_weights_keep_their_precision(
    copy: Callable[..., Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.double() + 1e-12

    model = copy("tied_llama", widen, dtype="float64")
    with pytest.raises(NoEffectError):
        flat(model, data_files, tmp_path / "out", lr=0, train="full", roles="mlp.down")
    flat(model, data_files, tmp_path / "out", train="full", roles="mlp.down")
    before, after = (load_file(root / "model.safetensors") for root in (model, tmp_path / "out"))
    name = "model.layers.0.mlp.down_proj.weight"
    change = after[name] - before[name]
    assert change.abs().max() > 1e-4
    # The change itself comes from fp32 training; where it is zero the stored digits are all there.
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    untouched = flat(model, data_files, tmp_path / "two", train="full", roles="mlp.down", lr=1e-6, max_steps=1)
    assert untouched["tensors"][name]["norm_change"] < 1e-4


def test_stored_copy_of_a_tied_head_moves_with_it(
    copy: Callable[..., Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    flat(copy("tied_llama", add), data_files, tmp_path / "out", train="full", roles="embed")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])


def test_buffers_of_old_gpt2_checkpoints_are_ignored(
    copy: Callable[..., Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
            tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)

    flat(copy("gpt2", add), data_files, tmp_path / "out")
    assert "transformer.h.0.attn.masked_bias" in load_file(tmp_path / "out" / "model.safetensors")


def test_large_weights_in_float16_are_no_damage(
    copy: Callable[..., Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"].fill_(1e5)

    model = copy("tied_llama", enlarge)
    with pytest.raises(UsageError, match="bfloat16"):
        unlearn(model, method="flat", out=tmp_path / "out", dtype="float16", settings=FAST, **data_files)


@pytest.mark.parametrize(
    ("config", "tokenizer", "code"),
    [
        ({"hidden_size": "32"}, None, 3),
        ({"num_attention_heads": 5}, None, 3),
        ({}, [], 3),
        ({}, {"chat_template": "{{ 'no messages' }}"}, 3),
        ({}, {"chat_template": "{{ messages[0].nothing.content }}"}, 3),
    ],
)
def test_malformed_side_files(
    config: dict[str, object],
    tokenizer: object,
    code: int,
    copy: Callable[..., Path],
    data_files: dict[str, Path],
    tmp_path: Path,
) -> None:
    model = copy("tied_llama", None, **config)
    if tokenizer is not None:
        path = model / "tokenizer_config.json"
        kept = json.loads(path.read_text())
        (model / "chat_template.jinja").unlink(missing_ok=True)
        path.write_text(json.dumps(kept | tokenizer if isinstance(tokenizer, dict) else tokenizer))
    with pytest.raises(SurgeryError) as caught:
        flat(model, data_files, tmp_path / "out")
    assert caught.value.exit_code == code
    assert not list(tmp_path.glob("out*"))


def test_tokenizer_with_more_ids_than_embeddings(
    copy: Callable[..., Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:200].clone()

    with pytest.raises(SurgeryError, match="200 embeddings") as caught:
        flat(copy("tied_llama", cut, vocab_size=200), data_files, tmp_path / "out")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("extra", [{"max_steps": 3, "check_every": 2}, {"max_steps": 0, "epochs": 1}])
def test_stop_rule_is_checked_at_the_last_step_and_a_miss_is_told(
    extra: dict[str, object], checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    model = checkpoints["tied_llama"]
    missed = flat(model, data_files, tmp_path / "missed", until="forget.prob<=0", **extra)
    assert any("was not reached" in notice for notice in missed["notices"])
    found = flat(model, data_files, tmp_path / "found", until="forget.prob<=100x", **(extra | {"check_every": 100}))
    assert found["operations"][0]["record"]["stopped"] == "until"
    assert found["notices"] == [] or "was not reached" not in found["notices"][0]


def test_gate_on_answers_needs_answers(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="switched off"):
        unlearn(
            checkpoints["tied_llama"], method="flat", out=tmp_path / "out", settings=FAST,
            require=["forget.rouge_l<=0.5"], **data_files,
        )  # fmt: skip


def test_infinite_perplexity_fails_its_gate_and_is_reported(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for name, path in data_files.items() for word in (f"--{name}", str(path))]
    words += [
        "--set",
        "train=full",
        "--set",
        "roles=all",
        "--set",
        "lr=300",
        "--set",
        "max_steps=1",
        "--until",
        "none",
        "--guard",
        "none",
    ]
    model = str(checkpoints["tied_llama"])
    code = run(["unlearn", model, "--method", "flat", "-o", str(tmp_path / "out"), *words, "--json",
                "--require", "utility.ppl<=5"])  # fmt: skip
    document = json.loads(capsys.readouterr().out)
    assert code == 6
    assert document["report"] == json.loads((tmp_path / "out.report.json").read_text())


def test_wrong_roles_and_devices_fail_in_a_dry_run(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    model = checkpoints["tied_llama"]
    for more in ({"settings": {"roles": "all"}}, {"device": "foo"}, {"dtype": "fp16"}):
        with pytest.raises(UsageError):
            unlearn(model, method="flat", out=tmp_path / "out", dry_run=True, **data_files, **more)  # type: ignore[arg-type]


def test_second_operation_keeps_the_history_of_the_first(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    first = flat(checkpoints["tied_llama"], data_files, tmp_path / "one")
    second = flat(tmp_path / "one", data_files, tmp_path / "two")
    assert first["history"] == []
    assert second["history"] == first["operations"]
    assert second["operations"][0]["dtype"] in {"float32", "bfloat16"}


def test_short_passages_are_skipped_and_counted(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    book = tmp_path / "book.txt"
    book.write_text("***\n\nThe mill stood by the weir, and the miller slept.\n\nI\n")
    manifest = flat(checkpoints["tied_llama"], {**data_files, "forget": book}, tmp_path / "out")
    assert manifest["metrics"]["forget.prob"]["after"]["n"] == 1
    assert any("2 passages of --forget" in notice for notice in manifest["notices"])


def test_answers_do_not_depend_on_other_rows_of_the_set(
    write_jsonl: Callable[..., Path], checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    long = {"question": "x" * 190, "answer": "yes"}
    (tmp_path / "templates.txt").write_text("No.\n")
    rows = [json.loads(line) for line in data_files["forget"].read_text().splitlines()]
    for name, content in (("short", rows), ("long", [*rows, long])):
        data = {**data_files, "forget": write_jsonl(f"{name}.jsonl", content)}
        outcome = unlearn(
            checkpoints["tied_llama"], method="flat", out=tmp_path / name, until="none", guard="none",
            settings={
                **FAST, "eval.generate": True, "eval.batch_size": 1, "templates": str(tmp_path / "templates.txt"),
            },
            **data,
        )  # fmt: skip
        answers = [example.before for example in outcome.examples]
        assert len(answers) == 3
        if name == "short":
            expected = answers
    assert answers == expected


def test_a_reader_that_leaves_is_no_failure() -> None:
    script = "import sys; from llmsurgery.cli.app import run; sys.exit(run(['methods', 'flat', '--json']))"
    command = f'{sys.executable} -c "{script}" | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}'
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0


def test_eval_shows_what_failed_its_gate(
    checkpoints: dict[str, Path], data_files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(checkpoints["tied_llama"]), "--forget", str(data_files["forget"]), "--json"]
    assert run([*words, "--require", "forget.prob>=2"]) == 6
    document = json.loads(capsys.readouterr().out)
    assert document["report"]["models"][0]["metrics"]["forget.prob"]["value"] <= 1


def test_eval_refuses_a_source_with_another_tokenizer(
    checkpoints: dict[str, Path], copy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from ..builders.tokenizer import byte_tokenizer

    other = copy("tied_llama")
    byte_tokenizer(merges=[("t", "h")]).save_pretrained(other)
    assert run(["eval", str(checkpoints["tied_llama"]), "--source", str(other)]) == 2
    assert "different tokenizers" in capsys.readouterr().err


def test_rows_to_forget_and_to_keep_are_counted(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in data_files["forget"].read_text().splitlines()]
    kept = [rows[0] | {"question": f" {rows[0]['question'].upper()}"}, rows[1] | {"answer": "something else"}]
    retain = tmp_path / "both.jsonl"
    retain.write_text(data_files["retain"].read_text() + "".join(json.dumps(row) + "\n" for row in kept))
    both = flat(checkpoints["tied_llama"], {"forget": data_files["forget"], "retain": retain}, tmp_path / "both")
    words = f"2 of {len(rows)} rows of --forget have a prompt that --retain has too, 1 of them with the same answer"
    assert any(notice.startswith(words) for notice in both["notices"])
    apart = flat(checkpoints["tied_llama"], data_files, tmp_path / "apart")
    assert not any("kept at once" in notice for notice in apart["notices"])


def test_a_ruined_model_is_said_to_be_one() -> None:
    def measured(ratio: float) -> Measurement:
        return Measurement({"utility.ppl_ratio": Figure(ratio, 40, None)})

    notices = Notices(Silent())
    warn_of_spill(measured(1.0), measured(1.2), notices)
    assert not notices.messages
    warn_of_spill(measured(1.0), measured(30.0), notices)
    assert notices.messages[0].startswith("utility.ppl_ratio is 30: ordinary text suffered")
