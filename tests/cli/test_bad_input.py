"""Every bad input: its exit code, its message, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from llmsurgery.__main__ import main
from llmsurgery.cli.app import run

from .test_commands import tree, unlearn

Damage = Callable[[Path], None]


@pytest.fixture
def model(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A private copy that a test may damage."""
    return Path(shutil.copytree(checkpoints["sharded_llama"], tmp_path / "model"))


def shard(root: Path, number: int = 1) -> Path:
    return sorted(root.glob("model-*.safetensors"))[number - 1]


def edit_header(path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + content[8 + length :])


def edit_json(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def truncate(root: Path) -> None:
    path = shard(root)
    path.write_bytes(path.read_bytes()[:-100])


def header_past_the_end(root: Path) -> None:
    path = shard(root)
    path.write_bytes(struct.pack("<Q", 10**9) + path.read_bytes()[8:])


def overlap(root: Path) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        names = [name for name in header if name != "__metadata__"]
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]

    # The first shard holds one tensor alone.
    edit_header(shard(root, 4), change)


def shard_outside(root: Path) -> None:
    def change(index: dict[str, object]) -> None:
        weights = index["weight_map"]
        assert isinstance(weights, dict)
        weights[next(iter(weights))] = "../outside.safetensors"

    edit_json(root / "model.safetensors.index.json", change)


def missing_shard(root: Path) -> None:
    shard(root).unlink()


def missing_tensor(root: Path) -> None:
    edit_json(root / "config.json", lambda config: config.update(num_hidden_layers=3))


def not_finite(root: Path) -> None:
    path = shard(root)
    content = bytearray(path.read_bytes())
    content[-2:] = b"\xc0\x7f"
    path.write_bytes(content)


def pickle_only(root: Path) -> None:
    for path in root.glob("model*"):
        path.unlink()
    (root / "pytorch_model.bin").write_bytes(b"never opened")


def quantised(root: Path) -> None:
    edit_json(root / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq"}))


def unknown_architecture(root: Path) -> None:
    edit_json(root / "config.json", lambda config: config.update(model_type="lama"))


def no_config(root: Path) -> None:
    (root / "config.json").unlink()


def no_tokenizer(root: Path) -> None:
    for path in root.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (truncate, 8, "model-00001"),
        (header_past_the_end, 8, "model-00001"),
        (overlap, 8, "model-00004"),
        (shard_outside, 8, "outside"),
        (missing_shard, 8, "model-00001"),
        (missing_tensor, 8, "layers.2"),
        (not_finite, 8, "NaN"),
        (pickle_only, 4, "pickle"),
        (quantised, 4, "quantis"),
        (unknown_architecture, 4, "llama"),
        (no_config, 3, "config.json"),
        (no_tokenizer, 3, "tokenizer"),
    ],
)
def test_damaged_checkpoints(
    damage: Damage,
    code: int,
    words: str,
    model: Path,
    data_files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(model)
    before = tree(model)
    assert run(unlearn(model, data_files, tmp_path / "out")) == code
    message = capsys.readouterr().err
    assert words in message
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert tree(model) == before
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ('{"question": "a", "answer": "b"}\n{"question": \n', 3, "forget.jsonl:2"),
        ('{"question": "a"}\n', 3, "question/answer"),
        ("", 3, "empty"),
        ('{"question": "a", "answer": ""}\n', 3, "forget.jsonl:1"),
        ('{"question": "a", "answer": "' + "long " * 200 + '"}\n', 3, "forget.jsonl:1"),
    ],
)
def test_bad_data(
    content: str,
    code: int,
    words: str,
    model: Path,
    data_files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data_files["forget"].write_text(content)
    assert run(unlearn(model, data_files, tmp_path / "out")) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--method", "flatt"], 2, "flat"),
        (["--set", "divergance=kl"], 2, "divergence"),
        (["--set", "rank"], 2, "name=value"),
        (["--set", "rank=many"], 2, "rank"),
        (["--set", "roles=mlp.downn"], 2, "mlp.down"),
        (["--set", "layers=7"], 2, "layers 0 to 1"),
        (["--set", "roles=embed"], 2, "train=full"),
        (["--set", "preset=papers"], 2, "paper"),
        (["--require", "forget.probs<=1"], 2, "forget.prob"),
        (["--require", "forget.prob"], 2, "METRIC"),
        (["--until", "utility.ppl<=1"], 2, "--require"),
        (["--dtype", "float8"], 2, "bfloat16"),
        (["--device", "tpu"], 2, "cuda"),
        (["--device", "cuda:9"], 7, "cuda:9"),
        (["--forget", "missing.jsonl"], 3, "missing.jsonl"),
        (["--retain", "forget.bin"], 3, "forget.bin"),
        (["--config", "missing.yaml"], 3, "missing.yaml"),
        (["--frobnicate"], 2, "frobnicate"),
        (["--seed", "x"], 2, "seed"),
        (["--set", "lr=0"], 5, "no stored weight changed"),
        (["--set", "max_steps=0"], 5, "no stored weight changed"),
        (["--set", "lr=1e30", "--set", "train=full"], 9, "lr"),
    ],
)
def test_bad_options(
    more: list[str],
    code: int,
    words: str,
    checkpoints: dict[str, Path],
    data_files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = checkpoints["tied_llama"]
    before = tree(model)
    assert run(unlearn(model, data_files, tmp_path / "out", *more)) == code
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message
    assert tree(model) == before
    assert not list(tmp_path.glob("out*"))


def test_errors_are_json_under_json(
    data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, code in (
        (unlearn(tmp_path / "nowhere", data_files, tmp_path / "out", "--json"), 3),
        (["unlearn", "--json"], 2),
    ):
        assert run(words) == code
        document = json.loads(capsys.readouterr().out)
        assert document["exit_code"] == code
        assert {"kind", "what", "why", "fix"} == document["error"].keys()


def test_forget_is_needed_with_a_model(checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["unlearn", str(checkpoints["gpt2"]), "--method", "flat"]) == 2
    assert "--forget" in capsys.readouterr().err


def test_existing_output_is_refused_and_kept(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = checkpoints["tied_llama"], tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep")
    assert run(unlearn(model, data_files, out)) == 2
    assert "--force" in capsys.readouterr().err
    assert (out / "precious.txt").read_text() == "keep"
    # A forced run that fails keeps the old output as well.
    assert run(unlearn(model, data_files, out, "--force", "--set", "lr=0")) == 5
    assert (out / "precious.txt").read_text() == "keep"
    assert run(unlearn(model, data_files, out, "--force", "-q")) == 0
    assert not (out / "precious.txt").exists()
    assert (out / "model.safetensors").is_file()
    (tmp_path / "other.partial").mkdir()
    assert run(unlearn(model, data_files, tmp_path / "other")) == 2
    assert run(unlearn(model, data_files, model, "--force")) == 2


def test_full_disk_and_unwritable_target(
    checkpoints: dict[str, Path],
    data_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = checkpoints["tied_llama"]
    before = tree(model)
    (tmp_path / "file").write_text("not a directory")
    assert run(unlearn(model, data_files, tmp_path / "file" / "out")) == 7

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        assert run(unlearn(model, data_files, tmp_path / "out")) == 7
    assert "free some space" in capsys.readouterr().err
    assert tree(model) == before
    # The training is not lost: its state waits for space.
    assert [path.name for path in tmp_path.glob("out*/*")] == [".llmsurgery-state"]
    assert run([*unlearn(model, data_files, tmp_path / "out"), "--resume"]) == 0
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_messages_hold_no_secrets_and_no_signs_that_terminals_obey(capsys: pytest.CaptureFixture[str]) -> None:
    for address in ("https://me:hf_0123456789abcdefgh@host/model", "x\x1b[2J/hf_0123456789abcdefgh"):
        assert run(["inspect", address]) == 3
        message = capsys.readouterr().err
        assert "hf_0123" not in message
        assert "\x1b" not in message


def test_interrupt_while_modules_are_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmsurgery.cli.app.run", interrupt)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_counts_that_no_tensors_fill_are_refused_at_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(model / "config.json", lambda config: config.update(num_hidden_layers=10**9))
    assert run(["inspect", str(model)]) == 8
    assert "1000000000 blocks" in capsys.readouterr().err


def test_a_bug_asks_for_a_report(
    checkpoints: dict[str, Path],
    data_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from llmsurgery.run import forms

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(forms, "write_edits", broken)
    assert run(unlearn(checkpoints["tied_llama"], data_files, tmp_path / "out")) == 1
    message = capsys.readouterr().err
    assert "ZeroDivisionError" in message
    assert "report it" in message
    assert [path.name for path in tmp_path.glob("out*/*")] == [".llmsurgery-state"]
    assert not (tmp_path / "out").exists()
