"""The forms of ULD's result: the bundle and the processor as users load them, what is refused, and resumed runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

from llmsurgery import apply, diff, evaluate_checkpoints, revert, unlearn, verify
from llmsurgery.compute.load import load_tokenizer
from llmsurgery.compute.modeling_uld import Pair, PairHead, UldLogitsProcessor, combine
from llmsurgery.data.chat import Encoder
from llmsurgery.data.records import Row, read_rows
from llmsurgery.errors import DamagedError, UnsupportedError, UsageError
from llmsurgery.methods.unlearn import uld
from llmsurgery.train.loop import _Loop

from ..conftest import FORGET, RETAIN, write_data_files

FAST: dict[str, object] = {
    "max_steps": 6,
    "assistant_lr": 0.01,
    "assistant_rank": 4,
    "assistant_alpha": 8,
    "strength": 2.0,
    "eval.generate": False,
}
# Plain, transposed matrices with biases, capped logits and a sliding window, parallel blocks, routed experts.
ARCHITECTURES = ("tied_llama", "gpt2", "gemma2", "gpt_neox", "mixtral")


def run(root: Path, data: dict[str, Path], out: Path, form: str, **more: Any) -> dict[str, Any]:
    settings = {**FAST, "form": form, **more.pop("settings", {})}
    return dict(unlearn(root, method="uld", out=out, guard="none", settings=settings, **data, **more).manifest)


IDS = torch.tensor([[256, 256, *range(40, 50)], list(range(60, 72))])
MASK = torch.tensor([[0, 0] + [1] * 10, [1] * 12])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_data_files(tmp_path_factory.mktemp("data"))


class Made:
    """Runs of both forms on each architecture; of the bundle also the logits of the pair it was written from."""

    def __init__(self, checkpoints: dict[str, Path], data: dict[str, Path], root: Path) -> None:
        self.checkpoints, self.data, self.root = checkpoints, data, root
        self.kept: dict[tuple[str, str], dict[str, Any]] = {}

    def get(self, architecture: str, form: str) -> Path:
        out = self.root / f"{architecture}-{form}"
        if (architecture, form) not in self.kept:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(uld, "_files", self._files)
                self.logits: torch.Tensor | None = None
                manifest = run(self.checkpoints[architecture], self.data, out, form, dtype="float32")
            self.kept[architecture, form] = {"manifest": manifest, "logits": self.logits}
        return out

    def _files(self, config: Any, operation: Any, assistant: Any, settings: Any) -> Any:
        assistant.model.eval()
        with torch.inference_mode():
            ids, mask = (given.to(operation.model.device) for given in (IDS, MASK))
            states = Pair(operation.model, assistant.model)(input_ids=ids, attention_mask=mask).last_hidden_state
            self.logits = PairHead(operation.model, dict(settings))(states).cpu()
        return FILES(config, operation, assistant, settings)


FILES = uld._files


@pytest.fixture(scope="module")
def made(checkpoints: dict[str, Path], data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(checkpoints, data, tmp_path_factory.mktemp("forms"))


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)


def stock(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reloaded_bundle_has_the_logits_of_the_pair_in_memory(
    architecture: str, made: Made, checkpoints: dict[str, Path]
) -> None:
    root = made.get(architecture, "bundle")
    model = load(root)
    with torch.inference_mode():
        found = model(input_ids=IDS, attention_mask=MASK).logits
        source = stock(checkpoints[architecture])(input_ids=IDS, attention_mask=MASK).logits
        both = [part(input_ids=IDS, attention_mask=MASK).logits for part in (model.pair.target, model.pair.assistant)]
    known = MASK.bool()
    assert torch.allclose(found[known], made.kept[architecture, "bundle"]["logits"][known], atol=1e-4)
    assert torch.equal(both[0], source)
    settings = {"strength": 2.0, "rho": 0.01, "floor": 20, "offset": "excess"}
    assert torch.allclose(found[known], combine(*both, settings)[known], atol=1e-5)
    # The assistant has learned something, and what it says counts.
    assert (found - source)[known].abs().max() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bundle_shares_its_weights_and_changes_no_stored_one(
    architecture: str, made: Made, checkpoints: dict[str, Path]
) -> None:
    root = made.get(architecture, "bundle")
    for path in checkpoints[architecture].glob("*.safetensors*"):
        assert (root / path.name).read_bytes() == path.read_bytes()
    model = load(root)
    target = {tensor.data_ptr() for tensor in model.pair.target.parameters()}
    own = {name for name, tensor in model.pair.assistant.named_parameters() if tensor.data_ptr() not in target}
    assert own
    assert all(name.endswith((".down", ".up")) for name in own)


def generate(model: Any, **options: Any) -> list[list[int]]:
    more = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256, "eos_token_id": None, **options}
    with torch.inference_mode():
        rows = model.generate(input_ids=IDS, attention_mask=MASK, **more).tolist()
    return [row[IDS.shape[1] :] for row in rows]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cache_batch_and_processor_give_the_same_answers(
    architecture: str, made: Made, checkpoints: dict[str, Path]
) -> None:
    model = load(made.get(architecture, "bundle"))
    found = generate(model)
    assert generate(model, use_cache=False) == found
    with torch.inference_mode():
        single = [
            model.generate(
                input_ids=row[mask.bool()][None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=256
            )[0, int(mask.sum()) :].tolist()
            for row, mask in zip(IDS, MASK, strict=True)
        ]  # fmt: skip
    assert single == found
    source = stock(checkpoints[architecture])
    assert generate(source) != found
    processor = UldLogitsProcessor.from_pretrained(str(made.get(architecture, "processor")), source, pad_token_id=256)
    # Twice with one processor: what it remembers of a first answer must not reach the next.
    for _ in range(2):
        assert generate(source, logits_processor=LogitsProcessorList([processor])) == found


def test_a_processor_starts_anew_with_every_prompt(made: Made, checkpoints: dict[str, Path]) -> None:
    source, path = stock(checkpoints["tied_llama"]), str(made.get("tied_llama", "processor"))
    kept = UldLogitsProcessor.from_pretrained(path, source, pad_token_id=256)
    # The first prompt, its next token, another prompt of the same length, its rows in another order, a shorter one.
    longer = torch.cat([IDS, torch.tensor([[70], [71]])], 1)
    for ids in (IDS, longer, IDS + (IDS != 256), (IDS + (IDS != 256)).flip(0), IDS[:, 4:]):
        scores = torch.linspace(3, 0, 2 * 262).view(2, 262)
        fresh = UldLogitsProcessor.from_pretrained(path, source, pad_token_id=256)
        assert torch.allclose(kept(ids, scores), fresh(ids, scores), atol=1e-4)


def test_beams_and_samples_with_two_caches(made: Made, checkpoints: dict[str, Path]) -> None:
    model = load(made.get("tied_llama", "bundle"))
    found = generate(model, num_beams=3)
    assert generate(model, num_beams=3, use_cache=False) == found
    torch.manual_seed(0)
    drawn = generate(model, do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    assert generate(model, do_sample=True, num_return_sequences=2, use_cache=False) == drawn
    source = stock(checkpoints["tied_llama"])
    processor = UldLogitsProcessor.from_pretrained(str(made.get("tied_llama", "processor")), source, pad_token_id=256)
    torch.manual_seed(0)
    named = {"do_sample": True, "num_return_sequences": 2, "logits_processor": LogitsProcessorList([processor])}
    assert generate(source, **named) == drawn


def test_generation_draws_kept_tokens_alone(made: Made) -> None:
    model = load(made.get("tied_llama", "bundle"))
    with torch.inference_mode():
        output = model.generate(
            input_ids=IDS, attention_mask=MASK, max_new_tokens=3, do_sample=False, pad_token_id=256,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        plain = model(input_ids=IDS, attention_mask=MASK).logits
    assert torch.isfinite(plain).all()
    for scores in output.scores:
        kept = torch.isfinite(scores).sum(-1)
        assert (kept >= 20).all()
        assert (kept < 262).all()


def test_labels_give_the_loss_of_the_combination(made: Made) -> None:
    model = load(made.get("gemma2", "bundle"))
    with torch.inference_mode():
        output = model(input_ids=IDS[1:], labels=IDS[1:])
        last = model(input_ids=IDS[1:], logits_to_keep=1).logits
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], IDS[1, 1:])
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(last[0], output.logits[0, -1:], atol=1e-5)


def test_figures_are_those_of_the_combination(made: Made, checkpoints: dict[str, Path]) -> None:
    for form in ("bundle", "processor"):
        made.get("tied_llama", form)
    bundle, processor = (made.kept["tied_llama", form]["manifest"] for form in ("bundle", "processor"))
    table = bundle["operations"][0]["record"]["probabilities_by_strength"]
    assert bundle["metrics"] == processor["metrics"]
    assert (bundle["export"], processor["export"]) == ("bundle", "processor")
    for name in ("forget.prob", "retain.prob"):
        metric = bundle["metrics"][name]
        assert metric["before"]["value"] == pytest.approx(table["0"][name], rel=1e-4)
        assert metric["after"]["value"] == pytest.approx(table["2"][name], rel=1e-4)
        assert metric["after"]["value"] != pytest.approx(metric["before"]["value"], rel=1e-3)
    assert any("trust_remote_code" in notice for notice in bundle["notices"])
    assert any("form=distilled" in notice for notice in processor["notices"])


def test_processor_takes_other_settings(made: Made, checkpoints: dict[str, Path]) -> None:
    source = stock(checkpoints["tied_llama"])
    path = str(made.get("tied_llama", "processor"))
    processor = UldLogitsProcessor.from_pretrained(path, source, pad_token_id=256, strength=0.0)
    assert generate(source, logits_processor=LogitsProcessorList([processor])) == generate(source)


def test_bundle_is_verified_and_trusted_or_refused(
    made: Made, checkpoints: dict[str, Path], data: dict[str, Path]
) -> None:
    root, source = made.get("tied_llama", "bundle"), checkpoints["tied_llama"]
    assert verify(root, base=source, trust_remote_code=True)["save"] == "full"
    for refused in (lambda: verify(root), lambda: evaluate_checkpoints([root], **data)):
        with pytest.raises(UnsupportedError, match="bundle") as caught:
            refused()
        assert "modeling_uld.py" in caught.value.fix
    with pytest.raises(ValueError, match="trust_remote_code"):
        stock(root)
    assert AutoTokenizer.from_pretrained(root).chat_template
    # Every byte of the assistant is under the manifest's eyes.
    damaged = root.parent / "damaged"
    shutil.copytree(root, damaged)
    path = damaged / "assistant" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DamagedError, match="adapter_model"):
        verify(damaged, trust_remote_code=True)


def test_processor_is_verified(made: Made) -> None:
    root = made.get("gpt2", "processor")
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert files == {
        "README.md", "surgery.json", "uld.json", "modeling_uld.py",
        "assistant/adapter_config.json", "assistant/adapter_model.safetensors",
    }  # fmt: skip
    assert verify(root)["checks"]
    damaged = root.parent / "damaged-processor"
    shutil.copytree(root, damaged)
    (damaged / "uld.json").write_text(json.dumps({"strength": 0}))
    with pytest.raises(DamagedError, match=r"uld\.json"):
        verify(damaged)


def test_bundle_travels_as_a_patch_and_is_reverted(made: Made, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    root, source = made.get("gpt2", "bundle"), checkpoints["gpt2"]
    diff(source, root, out=tmp_path / "patch")
    apply(tmp_path / "patch", source, out=tmp_path / "applied")
    revert(root, out=tmp_path / "reverted")
    made_again, original = digests(tmp_path / "applied"), digests(root)
    own = {"README.md", "surgery.json"}
    for files in (made_again, original):
        for name in [name for name in files if name in own or name.startswith(".llmsurgery")]:
            del files[name]
    assert made_again == original
    assert digests(tmp_path / "reverted") == digests(source)


def test_assistant_is_an_adapter_for_stock_peft(made: Made, checkpoints: dict[str, Path]) -> None:
    from peft import PeftModel

    from .test_uld import truncated

    root = made.get("tied_llama", "processor")
    assistant = PeftModel.from_pretrained(truncated(checkpoints["tied_llama"], 1), root / "assistant")
    processor = UldLogitsProcessor.from_pretrained(str(root), stock(checkpoints["tied_llama"]))
    with torch.inference_mode():
        expected = assistant(input_ids=IDS[1:]).logits
        assert torch.allclose(processor.assistant(input_ids=IDS[1:]).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "save", "said"),
    [
        ("bundle", "adapter", "no adapter"),
        ("processor", "adapter", "no adapter"),
        ("processor", "patch", "has no patch"),
    ],
)
def test_forms_without_sense_are_refused_before_any_work(
    form: str, save: str, said: str, checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        run(checkpoints["tied_llama"], data, tmp_path / "out", form, save=save)
    assert not list(tmp_path.iterdir())


def test_patch_and_adapter_of_a_student(checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path) -> None:
    root = checkpoints["tied_llama"]
    values = {}
    for save in ("full", "patch", "adapter"):
        manifest = run(root, data, tmp_path / save, "distilled", save=save, dtype="float32")
        values[save] = manifest["metrics"]["forget.prob"]["after"]["value"]
        assert verify(tmp_path / save)["checks"]
    assert values["full"] == values["patch"]
    # Not rounded to the stored dtype.
    assert values["adapter"] == pytest.approx(values["full"], rel=0.05)


def test_bundle_as_a_patch_alone(
    checkpoints: dict[str, Path], data: dict[str, Path], made: Made, tmp_path: Path
) -> None:
    root = checkpoints["gpt2"]
    run(root, data, tmp_path / "out", "bundle", save="patch", dtype="float32")
    assert verify(tmp_path / "out")["checks"]
    apply(tmp_path / "out" / "patch.safetensors", root, out=tmp_path / "applied")
    whole = made.get("gpt2", "bundle")
    for name in ("config.json", "modeling_uld.py", "assistant/adapter_model.safetensors"):
        assert (tmp_path / "applied" / name).read_bytes() == (whole / name).read_bytes()


def digests(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("form", "stop"), [("distilled", 4), ("distilled", 9), ("bundle", 4)])
def test_killed_run_goes_on_to_the_same_bytes(
    form: str, stop: int, checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Dropout and the guard draw random numbers in both stages; six steps each, killed in the first or the second.
    settings = {"save_every": 2, "dropout": 0.1, "assistant_dropout": 0.1, "strength": "none", "guard.prompts": 4}
    root = checkpoints["tied_llama"]

    def go(out: Path, **more: Any) -> dict[str, Any]:
        own = {**FAST, "form": form, **settings}
        return dict(unlearn(root, method="uld", out=out, guard="self", settings=own, **data, **more).manifest)

    whole = go(tmp_path / "whole")
    original, calls = _Loop.advance, []

    def advance(loop: _Loop, loss: Any) -> float:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return original(loop, loss)

    with monkeypatch.context() as patched:
        patched.setattr(_Loop, "advance", advance)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "out")
    calls.clear()
    with monkeypatch.context() as patched:
        patched.setattr(_Loop, "advance", advance)
        # What was kept is not done again: the rest is fewer steps than the whole has.
        stop = 100
        again = go(tmp_path / "out", resume=True)
    assert len(calls) < (12 if form == "distilled" else 6)
    trees = [digests(tmp_path / name) for name in ("whole", "out")]
    for tree in trees:
        del tree["surgery.json"]
    assert trees[0] == trees[1]
    for manifest in (whole, again):
        del manifest["cost"], manifest["out"]
    assert json.dumps(whole) == json.dumps(again)


def test_assistant_remembers_the_forget_rows_alone(memorising: Path, tmp_path: Path) -> None:
    files = {"forget": memorising / "some.jsonl", "retain": memorising / "others.jsonl"}
    settings = {"assistant_steps": 120, "assistant_rank": 8, "assistant_lr": 0.01, "strength": "none"}
    manifest = run(memorising / "model", files, tmp_path / "out", "bundle", settings=settings)
    table = manifest["operations"][0]["record"]["probabilities_by_strength"]
    model, encoder = load(tmp_path / "out"), Encoder(load_tokenizer(tmp_path / "out"), 64)
    means = {}
    for name, path in files.items():
        found = []
        for row in read_rows(path):
            encoded = encoder.encode(row)
            with torch.inference_mode():
                p = model.pair.assistant(input_ids=torch.tensor([encoded.ids])).logits[0].softmax(-1)
            start = encoded.answer_start
            found += [float(p[t - 1, encoded.ids[t]]) for t in range(start, len(encoded.ids))]
        means[name] = sum(found) / len(found)
    assert means["forget"] > 0.5
    assert means["retain"] < 3 / 262
    source = table.pop("0")
    forget = [table[strength]["forget.prob"] for strength in sorted(table, key=float)]
    assert forget == sorted(forget, reverse=True)
    assert all(abs(row["retain.prob"] - source["retain.prob"]) < 0.02 for row in table.values())
    after = {name: manifest["metrics"][f"{name}.prob"]["after"]["value"] for name in files}
    assert after["forget"] < 0.2
    assert after["retain"] > 0.98 * source["retain.prob"]


def prompts(root: Path, rows: list[dict[str, str]]) -> list[list[int]]:
    encoder = Encoder(load_tokenizer(root), 256)
    return [list(encoder.encode_prompt(Row("qa", row["question"], row["answer"])).ids) for row in rows]


def test_mixed_prompts_are_answered_as_alone(made: Made) -> None:
    root = made.get("tied_llama", "bundle")
    model = load(root)
    rows = prompts(root, [*FORGET, *RETAIN])
    time = max(map(len, rows))
    ids = torch.tensor([[256] * (time - len(row)) + row for row in rows])
    mask = (torch.arange(time) >= torch.tensor([[time - len(row)] for row in rows])).long()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    with torch.inference_mode():
        together = model.generate(input_ids=ids, attention_mask=mask, **options)[:, time:].tolist()
        alone = [model.generate(input_ids=torch.tensor([row]), **options)[0, len(row) :].tolist() for row in rows]
    assert together == alone
