"""Debiasing of vision-language models: the worked numbers, a LLaVA that says what is usual, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llmsurgery import apply, debias, diff, evaluate_checkpoints, revert, unlearn, verify
from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint, decode
from llmsurgery.cli.app import run
from llmsurgery.compute.modeling_contrast import ContrastLogitsProcessor, contrast, without_picture
from llmsurgery.compute.view import weight_view
from llmsurgery.data.drawings import Drawing
from llmsurgery.demo import demo_file, world_path
from llmsurgery.errors import InputError, UnsupportedError, UsageError
from llmsurgery.evaluate.pictured import PicturedScores
from llmsurgery.methods.picture_questions import set_prior
from llmsurgery.methods.priors import centred_offsets
from llmsurgery.run.execute import Outcome

DEMO = world_path("shapes")
QUESTION = "What colour is the shape?"
COLOURS = ("red", "green", "blue", "yellow")


def test_contrast_gives_the_worked_numbers() -> None:
    logits, free = torch.tensor([2, 1.8, 0.5, -3]), torch.tensor([2.5, 0.5, 0.4, -12])
    found = contrast(logits, free, 1, 0.1)
    assert found.tolist() == pytest.approx([1.5, 3.1, 0.6, -torch.inf], abs=1e-6)
    assert int(found.argmax()) == 1
    unmasked = contrast(logits, free, 1, 1e-9)
    assert unmasked.tolist() == pytest.approx([1.5, 3.1, 0.6, 6.0], abs=1e-5)
    # The cutoff is max(l) + log(beta) = -.302585: what lies just above it stays.
    edge = contrast(torch.tensor([2, -0.3025, -0.3027]), torch.zeros(3), 1, 0.1)
    assert torch.isfinite(edge).tolist() == [True, True, False]


def test_content_free_rows_give_the_worked_prior() -> None:
    rows = np.log([[0.6, 0.2, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]])
    # A total of the choices below 1 changes nothing.
    prior = set_prior([PicturedScores(list(rows - 2.0))], [0, 1, 2], 0.0)
    assert prior.tolist() == pytest.approx([0.6, 0.2, 0.1, 0.1])
    calibrated = softmax(np.log([0.55, 0.25, 0.15, 0.05]) + centred_offsets(prior))
    assert calibrated.tolist() == pytest.approx([0.22, 0.30, 0.36, 0.12])
    # Two ways to remove a picture are added.
    both = set_prior([PicturedScores([rows[0]]), PicturedScores([rows[1]])], [0], 0.0)
    assert both.tolist() == pytest.approx([0.55, 0.25, 0.1, 0.1])
    assert set_prior([PicturedScores([rows[0]])], [0], 0.1).tolist() == pytest.approx([0.5, 3 / 14, 1 / 7, 1 / 7])


def test_a_picture_is_removed_by_its_tokens() -> None:
    assert without_picture([5, 9, 9, 7], 9, "none") == [5, 7]
    assert without_picture([5, 9, 9, 7], 9, "unk", 3) == [5, 3, 3, 7]
    with pytest.raises(ValueError, match="unknown token"):
        without_picture([5, 9], 9, "unk")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """The runs that several tests look at."""
    root = tmp_path_factory.mktemp("results")
    runs: dict[str, dict[str, Any]] = {
        "calibrate": {"method": "vlm-calibrate"},
        "contrast": {"method": "vlm-contrast", "settings": {"content_free": "both", "eval.text_rows": 4}},
        "folded": {"method": "vlm-contrast", "settings": {"form": "folded", "eval.text_rows": 4}},
    }
    return {name: debias(out=root / name, **options) for name, options in runs.items()}


def figures(outcome: Outcome, when: str) -> dict[str, float]:
    metrics: Any = outcome.manifest["metrics"]
    return {name: row[when]["value"] for name, row in metrics.items()}


@pytest.mark.parametrize("name", ["calibrate", "contrast", "folded"])
def test_what_is_usual_wins_before_and_no_longer_after(name: str, results: dict[str, Outcome]) -> None:
    before, after = (figures(results[name], when) for when in ("before", "after"))
    assert before["vision.changed"] < 0.05
    assert before["vision.accuracy"] < 0.45
    assert after["vision.changed"] > 0.4
    assert after["vision.accuracy"] > 0.9
    assert after["utility.kl"] < 0.01
    record: Any = results[name].manifest["operations"][0]["record"]  # type: ignore[index]
    if name != "contrast":
        assert [max(group["prior"], key=group["prior"].get) for group in record["groups"]] == ["red", "light"]
        assert record["rho"] > 0.99
        assert record["shift_mean"] == pytest.approx(1, abs=0.05)


def held_rows(count: int) -> list[dict[str, Any]]:
    rows = demo_file("shapes", "mcq.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, rows) if row["question"] == QUESTION][:count]


def stock_inputs(processor: Any, rows: list[dict[str, Any]], shown: bool = True) -> Any:
    """What stock transformers makes of questions, padded on the left."""
    parts: list[dict[str, str]] = [{"type": "image"}] if shown else []
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*parts, {"type": "text", "text": row["question"]}]}],
            add_generation_prompt=True,
        )
        for row in rows
    ]
    images = [Image.fromarray(Drawing(**row["image"]).pixels()) for row in rows]
    more = {"images": images} if shown else {}
    return processor(text=texts, **more, padding=True, padding_side="left", return_tensors="pt")


def stock_answers(model: Any, processor: Any, rows: list[dict[str, Any]], shown: bool = True, **options: Any) -> Any:
    """Greedy first words by stock `generate`."""
    inputs = stock_inputs(processor, rows, shown)
    found = model.generate(**inputs, do_sample=False, max_new_tokens=1, **options)
    return [word.strip() for word in processor.batch_decode(found[:, -1:])]


def test_the_exported_checkpoint_says_in_stock_transformers_what_the_figures_say(results: dict[str, Outcome]) -> None:
    out = results["calibrate"].out
    assert out is not None
    processor = AutoProcessor.from_pretrained(out)
    rows = [json.loads(line) for line in demo_file("shapes", "mcq.jsonl").read_text().splitlines()]
    seen = {}
    for place in (DEMO, out):
        model = LlavaForConditionalGeneration.from_pretrained(place, dtype=torch.float32).eval()
        for shown in (True, False):
            seen[place, shown] = stock_answers(model, processor, rows, shown)
    found = evaluate_checkpoints([str(DEMO), str(out)], mcq=demo_file("shapes", "mcq.jsonl"), dtype="float32")
    models: Any = found["models"]
    for place, record in zip((DEMO, out), models, strict=True):
        right = np.mean([said == row["answer"] for said, row in zip(seen[place, True], rows, strict=True)])
        changed = np.mean([a != b for a, b in zip(seen[place, True], seen[place, False], strict=True)])
        assert record["metrics"]["vision.accuracy"]["value"] == pytest.approx(right)
        assert record["metrics"]["vision.changed"]["value"] == pytest.approx(changed)


def test_the_processor_works_in_stock_generate(results: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    out = results["contrast"].out
    assert out is not None
    assert not list(out.glob("*.safetensors"))
    assert results["contrast"].manifest["export"] == "processor"
    assert any("form=folded ends in plain weights" in text for text in results["contrast"].manifest["notices"])  # type: ignore[attr-defined]
    model = LlavaForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()
    processor, rows = AutoProcessor.from_pretrained(DEMO), held_rows(8)
    # The file works away from the package.
    place = spec_from_file_location("modeling_contrast_alone", out / "modeling_contrast.py")
    assert place is not None
    assert place.loader is not None
    code = module_from_spec(place)
    monkeypatch.setitem(sys.modules, place.name, code)
    place.loader.exec_module(code)
    kind = code.ContrastLogitsProcessor
    usual = stock_answers(model, processor, rows)
    said = stock_answers(model, processor, rows, logits_processor=[kind.from_pretrained(str(out), model)])
    assert set(usual) == {"red"}
    assert said == [row["answer"] for row in rows]


@pytest.mark.parametrize("kinds", [("none",), ("none", "unk")])
def test_both_streams_get_the_same_tokens(kinds: tuple[str, ...]) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(DEMO)
    rows = held_rows(3)
    rows[1]["question"] = f"Say it. {QUESTION}"
    inputs = stock_inputs(processor, rows)
    tokenizer, image_id = processor.tokenizer, processor.image_token_id
    settings = {"kinds": kinds, "alpha": 0.7, "beta": 0.2, "unknown_id": tokenizer.unk_token_id}
    decoder = ContrastLogitsProcessor(model, image_id, pad_id=tokenizer.pad_token_id, **settings)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True}
    found: Any = model.generate(**inputs, logits_processor=[decoder], do_sample=False, **options)
    width = inputs["input_ids"].shape[1]
    for number in range(len(rows)):
        for step, scores in enumerate(found.scores):
            ids = found.sequences[number, : width + step].tolist()
            ids = ids[next(place for place, token in enumerate(ids) if token != tokenizer.pad_token_id) :]
            with torch.no_grad():
                shown = model(
                    input_ids=torch.tensor([ids]), pixel_values=inputs["pixel_values"][number : number + 1]
                ).logits[0, -1]
                free = [
                    model(
                        input_ids=torch.tensor([without_picture(ids, image_id, kind, tokenizer.unk_token_id)])
                    ).logits[0, -1]
                    for kind in kinds
                ]
            # What must not end yet has no end token.
            shown[tokenizer.eos_token_id] = -torch.inf
            wanted = contrast(shown, torch.stack(free).mean(0), 0.7, 0.2)
            wanted[tokenizer.eos_token_id] = -torch.inf
            assert torch.allclose(scores[number], wanted, atol=1e-4)


def test_patch_and_undo_of_a_vision_language_model(results: dict[str, Outcome], tmp_path: Path) -> None:
    out = results["calibrate"].out
    assert out is not None
    diff(DEMO, out, out=tmp_path / "patch")
    apply(tmp_path / "patch", DEMO, out=tmp_path / "applied")
    weights = "model.safetensors"
    assert (tmp_path / "applied" / weights).read_bytes() == (out / weights).read_bytes()
    revert(out, out=tmp_path / "base")
    assert (tmp_path / "base" / weights).read_bytes() == (DEMO / weights).read_bytes()
    assert verify(out, base=DEMO)["save"] == "full"
    changed = [name for name, row in results["calibrate"].manifest["tensors"].items()]  # type: ignore[attr-defined]
    assert changed == ["language_model.lm_head.weight"]


def test_tensors_of_the_language_model_have_roles_and_their_place() -> None:
    checkpoint = Checkpoint.open(DEMO)
    structure = detect(checkpoint.config, checkpoint.tensors)
    assert structure.layers == 2
    assert {"embed", "attn.qkv", "mlp.down", "lm_head", "projector.in"} - set(structure.roles) == {"attn.qkv"}
    assert all(name.startswith("vision_tower.") for name in structure.other)
    model = LlavaForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32)
    for target in structure.tensors:
        values = torch.from_numpy(decode(checkpoint.read(target.stored), target.dtype))
        assert torch.equal(weight_view(model, target).detach(), values), target.stored
    # Published checkpoints leave the defaults of the language model out.
    bare = {**checkpoint.config, "text_config": {"model_type": "llama", "vocab_size": 384}}
    assert detect(bare, checkpoint.tensors).layers == 2
    other = {**checkpoint.config, "text_config": {"model_type": "opt"}}
    with pytest.raises(UnsupportedError, match="'opt' is not supported"):
        detect(other, checkpoint.tensors)
    assert run(["inspect", str(DEMO), "--json"]) == 0


def tied(root: Path) -> Path:
    """The demo with its head tied to the embedding."""
    shutil.copytree(DEMO, root)
    config = json.loads((root / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (root / "config.json").write_text(json.dumps(config))
    tensors = load_file(root / "model.safetensors")
    tensors["language_model.model.embed_tokens.weight"] = tensors.pop("language_model.lm_head.weight")
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    return root


def test_a_tied_head_is_stored_separately_and_loads_in_stock_transformers(tmp_path: Path) -> None:
    settings = {"untie": "always", "min_rho": 0.0, "kl_budget": None, "holdout": 0.9, "eval.text_rows": 2}
    source, data = tied(tmp_path / "tied"), demo_file("shapes", "mcq.jsonl")
    out = tmp_path / "out"
    debias(source, method="vlm-calibrate", mcq=data, out=out, settings=settings)
    model = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    assert not model.config.tie_word_embeddings
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert not torch.equal(embedding, head)
    source_model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    assert torch.equal(embedding, source_model.get_input_embeddings().weight)


@pytest.mark.parametrize("method", ["vlm-calibrate", "vlm-contrast"])
def test_a_text_model_is_refused(
    method: str, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["debias", str(checkpoints["sharded_llama"]), "--method", method, "--mcq"]
    assert run([*words, str(demo_file("shapes", "mcq.jsonl")), "-o", str(tmp_path / "out")]) == 4
    said = capsys.readouterr().err
    assert f"{method} is for vision-language models, and this is a text model" in said
    assert "--method contextual" in said
    assert not list(tmp_path.iterdir())


def test_methods_for_text_models_refuse_a_vision_language_model(tmp_path: Path, data_files: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedError, match="flat is for text models") as caught:
        unlearn(DEMO, method="flat", forget=data_files["forget"], out=tmp_path / "out")
    assert caught.value.exit_code == 4
    assert run(["lens", str(DEMO), "The baker"]) == 4


def test_pictures_of_a_text_model_cannot_be_evaluated(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedError, match="sees no pictures"):
        evaluate_checkpoints([str(checkpoints["sharded_llama"])], mcq=demo_file("shapes", "mcq.jsonl"))


def test_bad_data_and_settings_are_named(tmp_path: Path) -> None:
    letters = demo_file("letters", "mcq.jsonl")
    with pytest.raises(InputError, match="no question about a picture"):
        debias(DEMO, method="vlm-calibrate", mcq=letters, out=tmp_path / "out")
    with pytest.raises(UsageError, match="no distribution over the choices"):
        debias(method="vlm-calibrate", out=tmp_path / "out", settings={"target_prior": "0.5,0.5"})
    with pytest.raises(UsageError, match=r"vision\.changed|mcq"):
        debias(method="vlm-calibrate", out=tmp_path / "out", require=["mcq.rstd<=3"])
    bare = shutil.copytree(DEMO, tmp_path / "bare", ignore=shutil.ignore_patterns("processor_config.json"))
    with pytest.raises(InputError, match="no usable processor"):
        debias(bare, method="vlm-calibrate", mcq=demo_file("shapes", "mcq.jsonl"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_plans_the_head_alone(tmp_path: Path) -> None:
    few = {"eval.text_rows": 2}
    plan: Any = debias(method="vlm-calibrate", out=tmp_path / "out", dry_run=True, settings=few).manifest
    assert list(plan["targets"]) == ["lm_head"]
    assert plan["data"]["mcq"] == 160
    plan = debias(method="vlm-contrast", out=tmp_path / "out", dry_run=True, settings=few).manifest
    assert plan["tensors"] == 0
