"""Key Space Detection against its specification: worked numbers, the choice, the bundle after reloading, the fold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmsurgery import evaluate_checkpoints, unlearn, verify
from llmsurgery.compute.accumulate import Moments
from llmsurgery.compute.load import load_tokenizer
from llmsurgery.compute.modeling_skill import inside
from llmsurgery.data.chat import Encoder
from llmsurgery.data.records import Row
from llmsurgery.errors import InputError, NoEffectError, UnsupportedError, UsageError
from llmsurgery.evaluate.keys import FLOOR, build_box
from llmsurgery.methods.boxes import choose_box, smallest_scale

from ..conftest import FORGET, RETAIN, write_data_files

BOUNDS = (0.95, 0.02)
"""Recall and false alarms, the defaults."""
KEYS = torch.tensor([[0.0, 0], [1, 2], [2, 1], [1, 1]])


def box_of(keys: torch.Tensor) -> Any:
    moments = Moments(keys.shape[1])
    for key in keys.split(1):
        moments.update(key)
    return build_box(moments)


def test_worked_numbers() -> None:
    box = box_of(KEYS)
    assert box.center.tolist() == [1, 1]
    assert box.deviation.tolist() == pytest.approx([0.816497, 0.816497], abs=1e-6)
    assert box.distances(KEYS).tolist() == pytest.approx([1.224745, 1.224745, 1.224745, 0], abs=1e-6)
    assert box.alpha_min == pytest.approx(1.224745, abs=1e-6)
    # With c = 1 every probe key is inside, the border included.
    assert inside(KEYS, box.center.float(), box.half.float()).all()
    assert not inside(torch.tensor([2.1, 1.0]), box.center.float(), box.half.float())


def test_a_coordinate_that_never_varies_shuts_nothing_out() -> None:
    draw = torch.Generator().manual_seed(0)
    keys = torch.cat([torch.randn(30, 4, generator=draw), torch.full((30, 1), 0.5)], 1)
    box = box_of(keys)
    assert torch.isfinite(box.distances(keys)).all()
    assert box.deviation[4] == pytest.approx(FLOOR * float(keys.std(0).median()))


def test_smallest_scale_is_a_quantile() -> None:
    distances = [float(number) for number in range(1, 21)]
    assert smallest_scale(distances, 2.0, 0.95) == 9.5
    assert smallest_scale(distances, 2.0, 1.0) == 10.0


def test_the_layer_is_chosen_by_the_margin_among_those_without_false_alarms() -> None:
    held = [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]
    retain = [[3.0] * 50, [9.0] * 50, [1.0] * 50]
    choice = choose_box([1.0, 1.0, 1.0], held, retain, None, *BOUNDS)
    assert (choice.number, choice.recall, choice.false_alarms) == (1, 1.0, 0.0)
    assert choice.scale == pytest.approx(2.02)
    # Two of a hundred may be caught, three may not.
    assert choose_box([1.0], [[2.0]], [[1.0] * 2 + [9.0] * 98], None, *BOUNDS).margin == pytest.approx(9 / 2.02)
    assert choose_box([1.0], [[2.0]], [[1.0] * 3 + [9.0] * 97], None, *BOUNDS).margin == pytest.approx(1 / 2.02)
    # A layer with alarms loses to one without, however far the rest of its rows lie.
    choice = choose_box([1.0, 1.0], [[2.0]] * 2, [[1.0] * 3 + [99.0] * 97, [2.1] * 100], None, *BOUNDS)
    assert choice.number == 1


def test_without_retain_rows_the_last_layer_is_taken() -> None:
    choice = choose_box([1.0, 1.0], [[2.0], [2.0]], [[], []], None, *BOUNDS)
    assert (choice.number, choice.false_alarms) == (1, None)
    choice = choose_box([1.0, 1.0], [[], []], [[], []], 1.4, *BOUNDS)
    assert (choice.number, choice.scale, choice.recall) == (1, 1.4, None)


def run(root: Path, out: Path, data: dict[str, Path], **settings: object) -> dict[str, Any]:
    return dict(unlearn(root, method="key-space", out=out, settings=settings, dtype="float32", **data).manifest)


@pytest.fixture(scope="module")
def bundle(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("bundle")
    # c is given, so that all rows build the box and all are inside.
    manifest = run(checkpoints["tied_llama"], root / "out", write_data_files(root), layers="1", scale=1.05)
    return root / "out", manifest


def prompts(root: Path, rows: list[dict[str, str]]) -> list[list[int]]:
    encoder = Encoder(load_tokenizer(root), 256)
    return [list(encoder.encode_prompt(Row("qa", row["question"], row["answer"])).ids) for row in rows]


def continuations(model: Any, rows: list[list[int]], **options: object) -> list[list[int]]:
    time = max(map(len, rows))
    ids = torch.tensor([[256] * (time - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (time - len(row)) + [1] * len(row) for row in rows])
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
    return [row[time:] for row in output.tolist()]


def test_forget_rows_end_at_once_and_others_go_on_in_one_batch(
    bundle: tuple[Path, dict[str, Any]], checkpoints: dict[str, Path]
) -> None:
    root, manifest = bundle
    model = AutoModelForCausalLM.from_pretrained(root, trust_remote_code=True, dtype=torch.float32)
    source = AutoModelForCausalLM.from_pretrained(checkpoints["tied_llama"], dtype=torch.float32)
    end = Encoder(load_tokenizer(root), 256).end_id
    forget, retain = prompts(root, FORGET), prompts(root, RETAIN)
    mixed = [forget[0], retain[0], forget[1], retain[1], forget[2]]
    caught = manifest["operations"][-1]["record"]["false_alarms"]
    assert caught == 0
    found = continuations(model, mixed, eos_token_id=end, pad_token_id=256)
    for position in (0, 2, 4):
        assert found[position][0] == end
    expected = continuations(source, mixed, eos_token_id=end, pad_token_id=256)
    assert [found[1], found[3]] == [expected[1], expected[3]]
    # The order of rows changes nothing, and neither does the cache.
    turned = continuations(model, mixed[::-1], eos_token_id=end, pad_token_id=256)
    assert turned[::-1] == found
    assert continuations(model, mixed, eos_token_id=end, pad_token_id=256, use_cache=False) == found


def test_figures_are_those_of_the_bundle(
    bundle: tuple[Path, dict[str, Any]], checkpoints: dict[str, Path], data_files: dict[str, Path]
) -> None:
    root, manifest = bundle
    assert manifest["export"] == "bundle"
    assert manifest["metrics"]["retain.token_prob"]["after"] == manifest["metrics"]["retain.token_prob"]["before"]
    assert manifest["metrics"]["forget.prob"]["after"]["value"] < manifest["metrics"]["forget.prob"]["before"]["value"]
    assert any("trust_remote_code" in notice for notice in manifest["notices"])
    assert any("removes no knowledge" in notice for notice in manifest["notices"])
    with pytest.raises(UnsupportedError, match="bundle"):
        verify(root)
    assert verify(root, base=checkpoints["tied_llama"], trust_remote_code=True)["save"] == "full"
    assert AutoTokenizer.from_pretrained(root).chat_template


def test_an_untrusted_bundle_is_named_with_its_own_code_file(
    bundle: tuple[Path, dict[str, Any]], data_files: dict[str, Path]
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        evaluate_checkpoints([bundle[0]], **data_files)
    assert "modeling_skill.py" in caught.value.fix


def test_keys_in_the_box_become_the_mean_one_of_retain_prompts(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    source, out = checkpoints["tied_llama"], tmp_path / "out"
    run(source, out, data_files, action="steer", layers="1", scale=1.05, **{"eval.generate": False})
    steered = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    keys: list[torch.Tensor] = []
    down = plain.get_submodule("model.layers.1.mlp.down_proj")
    with torch.inference_mode():
        watching = down.register_forward_pre_hook(lambda _module, inputs: keys.append(inputs[0][0, -1]))
        for ids in prompts(source, RETAIN):
            expected = plain(input_ids=torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(steered(input_ids=torch.tensor([ids])).logits[0, -1], expected)
        watching.remove()
        mean = torch.stack(keys).mean(0)
        for ids in prompts(source, FORGET):
            before = plain(input_ids=torch.tensor([ids])).logits[0, -1]

            def replace(_module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
                inputs[0][0, -1] = mean
                return inputs

            handle = down.register_forward_pre_hook(replace)
            expected = plain(input_ids=torch.tensor([ids])).logits[0, -1]
            handle.remove()
            found = steered(input_ids=torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert (found - before).abs().max() > 0.01


def test_the_fold_is_one_matrix_and_raises_the_end_token(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    root = checkpoints["tied_llama"]
    manifest = run(root, tmp_path / "out", data_files, form="folded", layers="-1", **{"eval.generate": False})
    assert manifest["export"] == "plain"
    [name] = manifest["tensors"]
    assert name.endswith("layers.1.mlp.down_proj.weight")
    end = Encoder(load_tokenizer(root), 256).end_id
    probabilities = []
    for path in (root, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.inference_mode():
            rows = [
                model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[end] for ids in prompts(root, FORGET)
            ]
        probabilities.append(torch.stack(rows).mean())
    assert probabilities[1] > 5 * probabilities[0]


def test_data_that_cannot_be_used_is_refused(
    checkpoints: dict[str, Path], data_files: dict[str, Path], write_jsonl: Any, tmp_path: Path
) -> None:
    root = checkpoints["tied_llama"]
    few = {"forget": write_jsonl("few.jsonl", FORGET[:2])}
    with pytest.raises(InputError, match="too few"):
        run(root, tmp_path / "out", few)
    with pytest.raises(UsageError, match="--retain"):
        run(root, tmp_path / "out", {"forget": data_files["forget"]}, form="folded")
    with pytest.raises(UsageError, match="--retain"):
        run(root, tmp_path / "out", {"forget": data_files["forget"]}, action="steer")
    with pytest.raises(UsageError, match="no folded form"):
        run(root, tmp_path / "out", data_files, form="folded", action="steer")


def test_a_layer_with_one_key_for_all_questions_is_left_out(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    # Blocks of GPT-NeoX are parallel: the first MLP sees nothing but the prompt's last token.
    options: dict[str, Any] = {"method": "key-space", **data_files}
    manifest: Any = unlearn(checkpoints["gpt_neox"], out=tmp_path / "out", **options).manifest
    assert manifest["operations"][0]["record"]["layer"] > 0
    with pytest.raises(NoEffectError, match="one and the same key in layer 0"):
        unlearn(checkpoints["gpt_neox"], out=tmp_path / "none", settings={"layers": "0"}, **options)
