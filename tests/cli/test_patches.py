"""diff, apply, revert, verify, --save and --no-undo on real files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmsurgery.cli.app import run

from .test_commands import tree, unlearn

Capture = pytest.CaptureFixture[str]


def bytes_and_modes(root: Path) -> dict[str, tuple[str, int]]:
    return {name: (digest, mode) for name, (digest, mode, _) in tree(root).items()}


def checkpoint_files(root: Path) -> dict[str, tuple[str, int]]:
    files = bytes_and_modes(root)
    return {
        n: f for n, f in files.items() if n not in {"README.md", "surgery.json"} and not n.startswith(".llmsurgery/")
    }


def document(words: list[str], capsys: Capture, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*words, "--json"]) == code
    return dict(json.loads(capsys.readouterr().out))


@pytest.fixture(scope="module")
def results(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """(source, result of a short run) per architecture, made on first use; tests never write into them."""
    root = tmp_path_factory.mktemp("results")
    made: dict[str, tuple[Path, Path]] = {}

    def result(name: str) -> tuple[Path, Path]:
        if name not in made:
            source = Path(shutil.copytree(checkpoints[name], root / f"{name}-source"))
            (source / "tokenizer.json").chmod(0o640)
            (source / "README.md").chmod(0o604)
            rows = [{"question": "Who keeps the bees?", "answer": "Orla Venn keeps them."}]
            (root / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            out = root / f"{name}-out"
            assert run([*unlearn(source, {"forget": root / "forget.jsonl"}, out), "-q"]) == 0
            made[name] = (source, out)
        return made[name]

    return result


@pytest.fixture
def pair(results: Callable[[str], tuple[Path, Path]]) -> tuple[Path, Path]:
    return results("tied_llama")


# The conformance suite does the same by the Python API on every checkpoint.
@pytest.mark.parametrize("name", ["sharded_llama", "gpt2", "mixtral"])
def test_patch_leads_there_and_revert_leads_back(
    name: str, results: Callable[[str], tuple[Path, Path]], tmp_path: Path, capsys: Capture
) -> None:
    source, out = results(name)
    before, after = tree(source), tree(out)
    patch = tmp_path / "edit.patch"
    shown = document(["diff", str(source), str(out), "-o", str(patch)], capsys)
    assert shown["patch"]["bytes"] == patch.stat().st_size
    changed = json.loads((out / "surgery.json").read_text())["tensors"]
    assert set(shown["tensors"]) == set(changed)
    for tensor, row in shown["tensors"].items():
        assert row["entries_changed"] == changed[tensor]["entries_changed"]
        assert row["norm_change"] == pytest.approx(changed[tensor]["norm_change"])
    manifest = document(["apply", str(patch), str(source), "-o", str(tmp_path / "applied")], capsys)
    assert checkpoint_files(tmp_path / "applied") == checkpoint_files(out)
    assert manifest["tensors"] == changed
    assert [step["task"] for step in manifest["operations"]] == ["unlearn", "apply"]
    for result in (out, tmp_path / "applied"):
        assert run(["revert", str(result), "-o", str(tmp_path / f"from-{result.name}"), "-q"]) == 0
        assert bytes_and_modes(tmp_path / f"from-{result.name}") == bytes_and_modes(source)
    assert run(["verify", str(tmp_path / "applied"), "--base", str(source), "-q"]) == 0
    assert run(["verify", str(out), "--base", str(source)]) == 0
    assert "every stored tensor" in capsys.readouterr().out
    assert (tree(source), tree(out)) == (before, after)


def test_diff_shows_roles_and_equal_checkpoints(pair: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    source, out = pair
    assert run(["diff", str(source), str(out)]) == 0
    shown = capsys.readouterr().out
    assert "mlp.down" in shown
    assert "model.layers.0.mlp.down_proj.weight" in shown
    assert run(["diff", str(source), str(source)]) == 0
    assert "no difference" in capsys.readouterr().out
    same = document(["diff", str(source), str(source), "-o", str(tmp_path / "none.patch")], capsys)
    assert same["identical"]
    assert run(["apply", str(tmp_path / "none.patch"), str(source), "-o", str(tmp_path / "x")]) == 5


def test_other_tensors_are_shown_and_patched(
    checkpoints: dict[str, Path], pair: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    source, other = pair[0], checkpoints["sharded_llama"]
    shown = document(["diff", str(source), str(other), "-o", str(tmp_path / "p")], capsys)
    assert shown["only_after"] == ["lm_head.weight"]
    assert shown["patch"]["tensors"] == len(shown["tensors"]) + 1
    assert run(["apply", str(tmp_path / "p"), str(source), "-o", str(tmp_path / "applied"), "-q"]) == 0
    again = document(["diff", str(tmp_path / "applied"), str(other)], capsys)
    assert again["identical"]
    # The source's layout stays, and so one file holds all.
    assert (tmp_path / "applied" / "model.safetensors").is_file()
    assert run(["verify", str(tmp_path / "applied"), "--base", str(source), "-q"]) == 0
    assert run(["revert", str(tmp_path / "applied"), "-o", str(tmp_path / "reverted"), "-q"]) == 0
    assert bytes_and_modes(tmp_path / "reverted") == bytes_and_modes(source)
    # The way there and back are two patches.
    assert run(["diff", str(other), str(source), "-o", str(tmp_path / "back"), "-q"]) == 0
    assert run(["apply", str(tmp_path / "back"), str(other), "-o", str(tmp_path / "small"), "-q"]) == 0
    assert document(["diff", str(tmp_path / "small"), str(source)], capsys)["identical"]


def test_patch_file_is_not_overwritten_unasked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["diff", str(pair[0]), str(pair[1]), "-o", str(tmp_path / "p"), "-q"]
    assert [run(words), run(words), run([*words, "--force"])] == [0, 2, 0]
    assert run([*words[:-2], str(tmp_path)]) == 2


def test_side_files_travel_with_the_patch(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source = pair[0]
    changed = Path(shutil.copytree(pair[1], tmp_path / "changed", ignore=shutil.ignore_patterns(".llmsurgery")))
    generation = json.loads((changed / "generation_config.json").read_text())
    (changed / "generation_config.json").write_text(json.dumps({**generation, "temperature": 0.5}))
    (changed / "extra").mkdir()
    (changed / "extra" / "notes.txt").write_text("new")
    (changed / "chat_template.jinja").unlink()
    patch, applied = tmp_path / "p", tmp_path / "applied"
    assert run(["diff", str(source), str(changed), "-o", str(patch), "-q"]) == 0
    assert run(["apply", str(patch), str(source), "-o", str(applied), "-q"]) == 0
    assert checkpoint_files(applied) == checkpoint_files(changed)
    assert run(["revert", str(applied), "-o", str(tmp_path / "reverted"), "-q"]) == 0
    assert bytes_and_modes(tmp_path / "reverted") == bytes_and_modes(source)
    assert not (tmp_path / "reverted" / "extra").exists()
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (other / "generation_config.json").write_text("{}")
    assert run(["apply", str(patch), str(other), "-o", str(tmp_path / "x")]) == 3


def test_bad_patches_have_their_exit_codes(
    checkpoints: dict[str, Path], pair: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    source, out = pair
    patch = tmp_path / "p"
    assert run(["diff", str(source), str(out), "-o", str(patch), "-q"]) == 0
    failed = document(["apply", str(patch), str(out), "-o", str(tmp_path / "x")], capsys, code=3)
    assert "model.layers.0" in failed["error"]["what"]
    assert run(["apply", str(patch), str(checkpoints["gpt2"]), "-o", str(tmp_path / "x")]) == 3
    assert run(["apply", str(tmp_path / "missing"), str(source), "-o", str(tmp_path / "x")]) == 3
    assert run(["apply", str(patch), str(source)]) == 2
    damaged = bytearray(patch.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    patch.write_bytes(damaged)
    assert run(["apply", str(patch), str(source), "-o", str(tmp_path / "x")]) == 8
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.partial").exists()


def test_nothing_to_revert_and_damage(
    pair: tuple[Path, Path], data_files: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    source, out = pair
    assert run([*unlearn(source, {"forget": data_files["forget"]}, tmp_path / "bare"), "--no-undo", "-q"]) == 0
    assert not (tmp_path / "bare" / ".llmsurgery").exists()
    failed = document(["revert", str(tmp_path / "bare"), "-o", str(tmp_path / "x")], capsys, code=3)
    assert "nothing to revert" in failed["error"]["what"]
    assert run(["revert", str(source), "-o", str(tmp_path / "x")]) == 3
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert run(["revert", str(copy), "-o", str(tmp_path / "x")]) == 8
    assert run(["verify", str(copy)]) == 8
    assert run(["revert", str(out), "-o", str(out)]) == 2
    assert not (tmp_path / "x").exists()


def test_a_second_operation_reverts_to_the_first(
    pair: tuple[Path, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    first = pair[1]
    assert run([*unlearn(first, {"forget": data_files["forget"]}, tmp_path / "second"), "-q"]) == 0
    assert run(["revert", str(tmp_path / "second"), "-o", str(tmp_path / "back"), "-q"]) == 0
    kept = {name: file for name, file in bytes_and_modes(first).items() if not name.startswith(".llmsurgery/")}
    assert bytes_and_modes(tmp_path / "back") == kept


def test_verify_finds_every_kind_of_damage(pair: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    source, out = pair
    assert len(document(["verify", str(out)], capsys)["checks"]) == 5
    assert [row["check"] for row in document(["verify", str(source)], capsys)["checks"]] == ["finite", "loads"]
    assert run(["verify", str(source), "--base", str(source)]) == 3
    names = list(json.loads((out / "surgery.json").read_text())["tensors"])

    def damage(number: int, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        copy = Path(shutil.copytree(out, tmp_path / f"copy{number}"))
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    def nan(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][0] = torch.nan

    changes: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
        (lambda tensors: tensors[names[0]].view(torch.int16)[0, 0].add_(1), names[0]),
        (nan, "model.norm.weight"),
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight"),
        (lambda tensors: tensors.update(odd=torch.ones(2)), "odd"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}), "model.norm.weight"),
    ]
    for number, (change, named) in enumerate(changes):
        failed = document(["verify", str(damage(number, change))], capsys, code=8)
        assert named in failed["error"]["what"], failed
    # Without a hash of its own, an unedited tensor is compared with the base.
    quiet = damage(9, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert run(["verify", str(quiet)]) == 0
    assert run(["verify", str(quiet), "--base", str(source)]) == 8
    assert run(["verify", str(out), "--base", str(out)]) == 8


def test_save_patch_publishes_a_patch_alone(
    pair: tuple[Path, Path], data_files: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    source = pair[0]
    full, small = tmp_path / "full", tmp_path / "small"
    words = document(unlearn(source, data_files, full), capsys)
    manifest = document([*unlearn(source, data_files, small), "--save", "patch"], capsys)
    assert sorted(path.name for path in small.iterdir()) == ["README.md", "patch.safetensors", "surgery.json"]
    assert manifest["metrics"] == words["metrics"]
    assert manifest["tensors"] == words["tensors"]
    assert manifest["cost"]["patch_bytes"] == (small / "patch.safetensors").stat().st_size
    assert run(["apply", str(small), str(source), "-o", str(tmp_path / "applied"), "-q"]) == 0
    assert checkpoint_files(tmp_path / "applied") == checkpoint_files(full)
    assert run(["verify", str(small), "-q"]) == 0
    assert "Orla Venn" not in (small / "patch.safetensors").read_bytes().decode("latin-1")


@pytest.mark.parametrize("name", ["sharded_llama", "gpt2", "mixtral"])
def test_save_adapter_loads_with_stock_peft(
    name: str, checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    from peft import PeftModel

    source = checkpoints[name]
    adapter = tmp_path / "adapter"
    words = [*unlearn(source, data_files, adapter), "--save", "adapter", "--dtype", "float32"]
    manifest = document(words, capsys)
    assert manifest["export"] == "adapter"
    assert sorted(path.name for path in adapter.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "surgery.json",
    ]
    assert run([*unlearn(source, data_files, tmp_path / "full"), "-q", "--dtype", "float32"]) == 0
    ids = torch.arange(1, 25)[None]
    with torch.inference_mode():
        base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        plain = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, adapter)(input_ids=ids).logits
        folded = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)(input_ids=ids).logits
    change = (adapted - plain).abs().max()
    assert change > 0.01
    # The folded form is rounded to the stored dtype.
    assert (adapted - folded).abs().max() < (1e-3 if name == "gpt2" else 0.2) * change
    assert run(["verify", str(adapter), "-q"]) == 0


def test_forms_that_do_not_exist(
    pair: tuple[Path, Path], checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    words = unlearn(pair[0], data_files, tmp_path / "x")
    assert run([*words, "--save", "adapter", "--set", "train=full"]) == 2
    assert run([*words, "--save", "gguf"]) == 2
    # peft would take the name of a dense matrix for that of all experts.
    moe = unlearn(checkpoints["qwen2_moe"], data_files, tmp_path / "x")
    assert run([*moe, "--save", "adapter"]) == 4
    assert not (tmp_path / "x").exists()
