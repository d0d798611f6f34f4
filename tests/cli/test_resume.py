"""A run that is killed goes on with `--resume` and ends in the bytes of the uninterrupted run."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.faults.forked import killing, run_forked
from llmsurgery.cli.app import run
from llmsurgery.errors import DivergedError
from llmsurgery.train import state
from llmsurgery.train.loop import _Loop

ROUGH = ("--guard", "self", "--until", "none", "--set", "guard.prompts=4", "--set", "dropout=0.1")
STEPS = ("--set", "max_steps=7", "--set", "save_every=2", "--set", "eval.generate=false", "--dtype", "float32")

# What a child can do only if its parent has no threads of a GPU.
FORKS = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has trained on a GPU cannot be forked")


def command(model: Path, data: dict[str, Path], out: Path, *more: str) -> list[str]:
    files = [word for name, path in data.items() for word in (f"--{name}", str(path))]
    return ["unlearn", str(model), "--method", "flat", *files, "-o", str(out), *STEPS, *ROUGH, *more]


def result(out: Path) -> dict[str, object]:
    """Digests of everything but the manifest, and the manifest without what may differ."""
    manifest: dict[str, Any] = json.loads((out / "surgery.json").read_text())
    del manifest["cost"], manifest["out"]
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "surgery.json")
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files} | {"": manifest}


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["sharded_llama"]


@FORKS
@pytest.mark.parametrize(
    ("place", "name", "count", "when"),
    [
        # The third state is complete under its temporary name.
        (state, "save_file", 3, "after"),
        (os, "pwrite", 2, "before"),
    ],
    ids=["state", "weights"],
)
def test_kill_and_resume_gives_the_uninterrupted_bytes(
    place: object, name: str, count: int, when: str, model: Path, data_files: dict[str, Path], tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    code = run_forked(command(model, data_files, out), log, killing(place, name, count, when))
    assert code == -signal.SIGKILL, log.read_text()
    assert not out.exists()
    assert (tmp_path / "out.partial").is_dir()
    assert run(command(model, data_files, out)) == 2
    assert run(command(model, data_files, out, "--resume")) == 0
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]
    whole = tmp_path / "whole"
    assert run(command(model, data_files, whole)) == 0
    assert result(out) == result(whole)


class Stop:
    """Raises something after a number of steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int, error: BaseException) -> None:
        self.calls, self.steps, self.error = 0, steps, error
        self.original = _Loop.advance
        monkeypatch.setattr(_Loop, "advance", lambda loop, loss: self.advance(loop, loss))

    def advance(self, loop: _Loop, loss: Any) -> float:
        self.calls += 1
        if self.calls > self.steps:
            raise self.error
        return self.original(loop, loss)


def interrupt(monkeypatch: pytest.MonkeyPatch, words: list[str], steps: int) -> None:
    with monkeypatch.context() as patched:
        Stop(patched, steps, KeyboardInterrupt())
        assert run(words) == 130


def test_interrupted_run_tells_how_to_go_on_and_refuses_another_run(
    model: Path,
    data_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    words = command(model, data_files, out)
    interrupt(monkeypatch, words, 5)
    assert "the state of step 4 is kept" in capsys.readouterr().err
    kept = sorted(path.name for path in (tmp_path / "out.partial").rglob("*"))
    assert kept == [".llmsurgery-state", "run.json", "training-0.safetensors"]
    assert run([*words, "--resume", "--set", "rank=4", "--seed", "3"]) == 2
    message = capsys.readouterr().err
    assert "settings (rank)" in message
    assert "seed" in message
    assert kept == sorted(path.name for path in (tmp_path / "out.partial").rglob("*"))
    assert run([*words, "--resume", "--set", "lr=0.0005"]) == 0
    assert "going on from step 4" in capsys.readouterr().err
    record = json.loads((out / "surgery.json").read_text())["operations"][0]["record"]
    assert record["resumed_with"] == [{"step": 4, "lr": 0.0005, "clip": 1.0}]


@pytest.mark.parametrize(("method", "way"), [("dpo", "lora"), ("kl-min", "full"), ("rmu", "full")])
def test_draws_and_references_of_a_loss_survive(
    method: str, way: str, model: Path, data_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retain rows and alternatives go on to be drawn as they would have been; references are those of the source."""
    outs = [tmp_path / "out", tmp_path / "whole"]
    words, whole = (command(model, data_files, out, "--set", f"train={way}", "--set", "batch_size=2") for out in outs)
    for line in (words, whole):
        line[line.index("flat")] = method
    interrupt(monkeypatch, words, 5)
    assert run([*words, "--resume"]) == 0
    assert run(whole) == 0
    assert result(outs[0]) == result(outs[1])


def test_interruption_before_the_first_step_leaves_nothing(
    model: Path, data_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, command(model, data_files, tmp_path / "out"), 0)
    assert not list(tmp_path.glob("out*"))


def test_divergence_keeps_the_last_good_state(
    model: Path,
    data_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command(model, data_files, tmp_path / "out")
    with monkeypatch.context() as patched:
        Stop(patched, 4, DivergedError("the loss is nan"))
        assert run(words) == 9
    # The state of step 4 is due, but no loss at its weights was finite yet.
    message = capsys.readouterr().err
    assert "the state of step 2 is kept" in message
    assert "lower --set lr" in message
    assert run([*words, "--set", "lr=1e-5", "--resume"]) == 0


def test_ruined_weights_are_not_kept(model: Path, data_files: dict[str, Path], tmp_path: Path) -> None:
    words = command(model, data_files, tmp_path / "out", "--set", "save_every=1", "--set", "lr=1e30")
    assert run(words) == 9
    assert not list(tmp_path.glob("out*"))


def test_failed_gate_keeps_no_state(model: Path, data_files: dict[str, Path], tmp_path: Path) -> None:
    gate = ("--require", "forget.token_prob<=0")
    assert run(command(model, data_files, tmp_path / "out", *gate)) == 6
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.report.json"]
    assert run(command(model, data_files, tmp_path / "out", *gate, "--force", "--keep-partial")) == 6
    assert not (tmp_path / "out.partial" / ".llmsurgery-state").exists()
    assert (tmp_path / "out.partial" / "config.json").is_file()


def test_resume_without_an_unfinished_run_starts_one(model: Path, data_files: dict[str, Path], tmp_path: Path) -> None:
    assert run(command(model, data_files, tmp_path / "out", "--resume")) == 0
    assert run(command(model, data_files, tmp_path / "out", "--resume")) == 2


def test_generated_name_of_an_unfinished_run_is_found_again(
    model: Path, data_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = command(model, data_files, tmp_path / "unused")
    place = words.index("-o")
    del words[place : place + 2]
    interrupt(monkeypatch, words, 3)
    assert (tmp_path / "llmsurgery-out" / "unlearn-flat.partial").is_dir()
    assert run(words) == 0
    assert run([*words, "--resume"]) == 0
    assert sorted(path.name for path in Path("llmsurgery-out").iterdir()) == ["unlearn-flat", "unlearn-flat-002"]


def test_running_run_is_not_taken_over(
    model: Path, data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmsurgery.checkpoint.target import Claim

    claim = Claim(tmp_path / "out", force=False)
    (claim.path / "kept").write_text("x")
    assert run(command(model, data_files, tmp_path / "out", "--resume")) == 2
    assert "another run" in capsys.readouterr().err
    assert (claim.path / "kept").is_file()
    claim.discard()
