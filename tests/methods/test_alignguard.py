"""alignguard: the worked numbers, adapters as peft loads them, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmsurgery import recover_alignment, verify
from llmsurgery.arch.adapter import CONFIG, WEIGHTS, Adapter
from llmsurgery.arch.spec import RoleTensor
from llmsurgery.cli.app import run
from llmsurgery.demo import demo_file, world_path
from llmsurgery.errors import NoEffectError
from llmsurgery.methods.adapter_repair import Choice, Removal
from llmsurgery.train.sensitive import Sensitive

from ..builders.twin import adapter_of, twin
from ..conftest import HARMFUL, write_rows

TARGET = RoleTensor("attn.o", 0, "weight", "m", "m.weight", (2, 2), "F32", False)


def small_adapter(root: Path, first: list[list[float]], second: list[list[float]], **settings: object) -> Adapter:
    root.mkdir(exist_ok=True)
    factors = {"A": torch.tensor(first), "B": torch.tensor(second)}
    save_file({f"base_model.model.m.lora_{side}.weight": v for side, v in factors.items()}, root / WEIGHTS)
    (root / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 3, **settings}))
    return Adapter.open(root)


def removal_of(adapter: Adapter, side: str, *basis: float) -> Removal:
    column = torch.tensor(basis, dtype=torch.float64)[:, None]
    return Removal(adapter, [TARGET], side, {"m": Sensitive(column, torch.ones(1, dtype=torch.float64), 1.0)})


def test_worked_numbers(tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "a", [[1.0, 1.0]], [[1.0], [2.0]])
    removal = removal_of(adapter, "out", 1.0, 0.0)
    first, second = removal.repaired(TARGET, Choice(1.0, 1))
    assert (first.tolist(), second.tolist()) == ([[1.0, 1.0]], [[0.0], [2.0]])
    assert removal.repaired(TARGET, Choice(0.5, 1))[1].tolist() == [[0.5], [2.0]]
    files = removal.files(Choice(1.0, 1))
    assert files is not None
    (tmp_path / "a" / WEIGHTS).write_bytes(files[WEIGHTS])
    # What was removed is gone: a second time changes no byte, as kappa=0 never does.
    again = removal_of(Adapter.open(tmp_path / "a"), "out", 1.0, 0.0)
    assert again.files(Choice(1.0, 1)) is None
    assert removal.files(Choice(0.0, 1)) is None
    into = removal_of(adapter, "in", 0.6, 0.8)
    first, second = into.repaired(TARGET, Choice(1.0, 1))
    assert first.numpy() == pytest.approx(np.array([[1 - 0.84, 1 - 1.12]]))
    assert float(first @ torch.tensor([0.6, 0.8], dtype=torch.float64)) == pytest.approx(0)


def test_scales_as_peft_reads_them(tmp_path: Path) -> None:
    pair = ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
    assert small_adapter(tmp_path / "a", *pair).scale("m") == 1.5
    assert small_adapter(tmp_path / "b", *pair, use_rslora=True).scale("m") == pytest.approx(3 / 2**0.5)
    assert small_adapter(tmp_path / "c", *pair, alpha_pattern={"m": 8}).scale("m") == 4
    assert small_adapter(tmp_path / "d", *pair, alpha_pattern={"n": 8}).scale("m") == 1.5


@pytest.fixture(scope="module")
def safe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[dict[str, object]] = [{**row, "completion": "I'm sorry, no."} for row in HARMFUL]
    return write_rows(tmp_path_factory.mktemp("safe") / "safe.jsonl", rows)


QUICK = {"kappa": 1.0, "controls": False, "eval.refusal_tokens": 2, "eval.text_rows": 1}


def test_the_adapter_loads_through_peft_and_equals_the_merged_form(
    checkpoints: dict[str, Path], safe: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    base = checkpoints["gpt2"]
    adapter = adapter_of(base, torch.bfloat16)
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    common: dict[str, Any] = {"method": "alignguard", "aligned": base, "harmful": safe}
    found = recover_alignment(adapter, **common, out=tmp_path / "out", settings=QUICK)
    manifest: Any = found.manifest
    assert (manifest["export"], manifest["save"]) == ("adapter", "adapter")
    assert set(manifest["adapter"]["sha256"]) == {CONFIG, WEIGHTS}
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert (tmp_path / "out" / CONFIG).read_bytes() == before[CONFIG]
    old, new = (load_file(root / WEIGHTS) for root in (adapter, tmp_path / "out"))
    assert list(old) == list(new)
    assert {name for name in old if not torch.equal(old[name], new[name])} == {n for n in old if "lora_B" in n}
    assert {value.dtype for value in new.values()} == {torch.bfloat16}
    record = manifest["operations"][0]["record"]
    assert record["answers"] == {"given": 3, "of_the_base": 0, "left_out": 0}
    assert record["sensitivity_after"] < record["sensitivity_before"]
    for row in record["matrices"].values():
        assert 0 < row["share"] <= 1
        assert row["sensitivity_after"] < 0.5 * row["sensitivity_before"]
    assert verify(tmp_path / "out")["save"] == "adapter"
    recover_alignment(adapter, **common, out=tmp_path / "merged", settings={**QUICK, "form": "merged"})
    assert verify(tmp_path / "merged", base=base)["save"] == "full"
    ids = torch.arange(1, 25)[None]
    with torch.inference_mode():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(plain, tmp_path / "out")(input_ids=ids).logits
    # One of them is rounded to the adapter's dtype, the other to the model's.
    assert float((merged - loaded).abs().max()) < 0.02 * float(merged.abs().max())
    with pytest.raises(NoEffectError):
        recover_alignment(adapter, **common, out=tmp_path / "none", settings={**QUICK, "kappa": 0.0})


def without(key: str, value: object) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        config = json.loads((root / CONFIG).read_text())
        (root / CONFIG).write_text(json.dumps({**config, key: value}))

    return change


def pickled(root: Path) -> None:
    (root / WEIGHTS).rename(root / "adapter_model.bin")


def half(root: Path) -> None:
    tensors = load_file(root / WEIGHTS)
    save_file({name: value for name, value in tensors.items() if "lora_A" in name}, root / WEIGHTS)


def foreign(root: Path) -> None:
    tensors = load_file(root / WEIGHTS)
    save_file({name.replace("layers.", "stages."): value for name, value in tensors.items()}, root / WEIGHTS)


def embedding(root: Path) -> None:
    tensors = load_file(root / WEIGHTS)
    save_file({**tensors, "base_model.model.embed.lora_embedding_A": torch.ones(2, 2)}, root / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "code", "what"),
    [
        (without("use_dora", True), 4, "use_dora=True"),
        (without("modules_to_save", ["lm_head"]), 4, "modules_to_save"),
        (without("peft_type", "IA3"), 4, "peft_type='IA3'"),
        (pickled, 4, "pickle"),
        (embedding, 4, "no factor of a matrix"),
        (half, 8, "do not fit"),
        (foreign, 3, "is not for the base"),
        (lambda root: (root / WEIGHTS).unlink(), 3, "holds no weights"),
    ],
)
def test_adapters_that_cannot_be_repaired(
    change: Callable[[Path], None], code: int, what: str, checkpoints: dict[str, Path], safe: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base = checkpoints["tied_llama"]
    root = shutil.copytree(adapter_of(base), tmp_path / "adapter")
    change(root)
    words = ["recover-alignment", str(root), "--method", "alignguard", "--aligned", str(base), "--harmful", str(safe)]
    assert run([*words, "-o", str(tmp_path / "out")]) == code
    assert what in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_and_options_that_do_not_fit(
    checkpoints: dict[str, Path], safe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = checkpoints["tied_llama"]
    adapter = adapter_of(base)

    def code(model: Path, *more: str) -> int:
        words = ["recover-alignment", str(model), "--method", "alignguard", "--harmful", str(safe)]
        return run([*words, "-o", str(tmp_path / "out"), *more])

    assert code(adapter) == 2
    assert code(twin(base, "aligned"), "--aligned", str(base)) == 4
    assert code(adapter, "--aligned", str(checkpoints["gpt2"])) == 3
    assert code(adapter, "--aligned", str(base), "--save", "patch") == 2
    assert code(adapter, "--aligned", str(base), "--save", "adapter", "--set", "form=merged") == 2
    assert run(["recover-alignment", str(adapter), "--aligned", str(base), "--harmful", str(safe)]) == 4
    # An adapter is no place for a result.
    inside = ["--force", "-o", str(adapter)]
    assert code(adapter, "--aligned", str(base), *inside) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_directions_of_safe_answers_beat_random_ones_on_the_demo() -> None:
    """Removing them makes the refusals likelier than removing as many random directions does."""
    from llmsurgery.arch.detect import detect
    from llmsurgery.checkpoint import Checkpoint
    from llmsurgery.compute.load import load_model, load_tokenizer
    from llmsurgery.compute.progress import Silent
    from llmsurgery.compute.view import weight_view
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.prompts import read_prompts
    from llmsurgery.evaluate.likelihood import score_rows, token_probability
    from llmsurgery.run.adapted import merged_model, merged_reader
    from llmsurgery.run.source import tensor_reader
    from llmsurgery.train.sensitive import sensitive_directions

    checkpoint = Checkpoint.open(world_path("refuse-aligned"))
    structure = detect(checkpoint.config, checkpoint.tensors)
    adapter = Adapter.open(world_path("refuse-adapter"))
    targets = adapter.targets(structure, "the base")
    encoder = Encoder(load_tokenizer(checkpoint.root), 96)
    prompts = read_prompts(demo_file("refuse", "harmful.jsonl"))[:6]
    rows = [encoder.encode(row, "I'm sorry, I can't talk about purple things.") for row in prompts]
    model = load_model(checkpoint.root, torch.float32, torch.device("cpu"))
    widths = {target.module: target.shape[1] for target in targets}
    bases = sensitive_directions(model, widths, rows, encoder.pad_id, 6, 8, "in", lambda *_: None)
    read = tensor_reader(checkpoint)
    merged_model(model, targets, merged_reader(adapter, targets, read))

    def refusing(removal: Removal) -> float:
        for target in targets:
            left, right = (torch.from_numpy(factor) for factor in removal.low_rank(target, Choice(1.0, 8)))
            values = torch.from_numpy(read(target.stored)).double() + left @ right
            weight_view(model, target).copy_(values.float())
        scores = score_rows(model, rows, encoder.pad_id, 6, Silent(), "")
        return float(np.mean([token_probability(score, row) for score, row in zip(scores, rows, strict=True)]))

    def drawn(seed: int) -> Removal:
        torch.manual_seed(seed)
        random = {
            name: Sensitive(torch.linalg.qr(torch.randn(width, 8, dtype=torch.float64))[0], torch.ones(8), 8.0)
            for name, width in widths.items()
        }
        return Removal(adapter, targets, "in", random)

    own = refusing(Removal(adapter, targets, "in", bases))
    others = [refusing(drawn(seed)) for seed in range(5)]
    assert own > max(others)
