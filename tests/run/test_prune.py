"""`prune` on whole checkpoints: what a slow reference makes of them, what stays, what shrinks, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmsurgery import prune
from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import RoleTensor, Structure
from llmsurgery.checkpoint import Checkpoint, decode
from llmsurgery.compute.load import load_model
from llmsurgery.compute.view import weight_view
from llmsurgery.data.records import read_rows
from llmsurgery.data.windows import pack_windows
from llmsurgery.errors import GateError, InputError, UsageError
from llmsurgery.methods import kept_blocks
from llmsurgery.methods.registry import find_method
from llmsurgery.methods.settings import settings_of
from llmsurgery.run.encoding import make_encoder

from ..conftest import write_rows
from ..methods.test_prune_matrices import slow_sparsegpt

SENTENCES = [
    "The river runs past the mill and the old bridge, and on to the sea.",
    "Bread is baked at dawn, sold before noon, and gone by three.",
    "Seven geese crossed the yard; the dog did not even look up.",
    "Who keeps the bees in winter? Nobody does: they keep themselves.",
    "A ferry leaves at nine, and another one at ten if the tide is right.",
    "Count the steps: one, two, three, forty, and you are at the top!",
]
SETTINGS = {"window": 24, "samples": 8, "domain_samples": 8, "eval.generate": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("texts")
    texts = {"calibration": SENTENCES[:4], "domain": SENTENCES, "text": SENTENCES[4:]}
    return {name: write_rows(root / f"{name}.jsonl", [{"text": t} for t in rows]) for name, rows in texts.items()}


def run(method: str, model: Path, data: dict[str, Path], out: Path, **options: Any) -> dict[str, Any]:
    known = settings_of(find_method(method).config_type)
    shared = {name: value for name, value in SETTINGS.items() if name in known or "." in name}
    settings = {**shared, **options.pop("settings", {})}
    files = {name: path for name, path in data.items() if name != "domain" or method == "d-pruner"}
    outcome = prune(model, method=method, out=out, settings=settings, **{**files, **options})
    manifest: dict[str, Any] = outcome.manifest
    return manifest


def roles(root: Path) -> Structure:
    checkpoint = Checkpoint.open(root)
    return detect(checkpoint.config, checkpoint.tensors)


def stored(root: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(root)
    return {n: torch.from_numpy(decode(checkpoint.read(n), i.dtype)) for n, i in checkpoint.tensors.items()}


def turned(values: torch.Tensor, target: RoleTensor) -> torch.Tensor:
    return values.T if target.transposed else values


def windows_of(root: Path, path: Path) -> torch.Tensor:
    encoder = make_encoder(Checkpoint.open(root))
    return torch.tensor(pack_windows(encoder, read_rows(path), 24, 8, "calibration"))


def inputs_of(model: Any, target: RoleTensor, ids: torch.Tensor) -> torch.Tensor:
    """What enters a matrix when the whole model reads all windows, one by one."""
    caught: list[torch.Tensor] = []
    module = model.get_submodule(target.module)
    handle = module.register_forward_pre_hook(lambda _m, arguments: caught.append(arguments[0]))
    with torch.no_grad():
        for row in ids:
            model(input_ids=row[None])
    handle.remove()
    return torch.cat(caught).reshape(-1, caught[0].shape[-1])


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_wanda_is_the_slow_reference(
    architecture: str, checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    root = checkpoints[architecture]
    manifest = run("wanda", root, data, tmp_path / "out", dtype="float32")
    structure, new, old = roles(root), stored(tmp_path / "out"), stored(root)
    model = load_model(root, torch.float32, torch.device("cpu"))
    ids = windows_of(root, data["calibration"])
    targets = structure.select(["linear"])
    agreed = total = 0
    for layer in range(structure.layers):
        members = [target for target in targets if target.layer == layer]
        caught = {target.stored: inputs_of(model, target, ids) for target in members}
        for target in members:
            weight = turned(old[target.stored], target)
            score = weight.abs() * caught[target.stored].square().sum(0).sqrt()
            order = score.argsort(dim=1, stable=True)[:, : score.shape[1] // 2]
            wanted = weight.scatter(1, order, 0)
            found = turned(new[target.stored], target)
            assert ((found == 0).sum(1) == score.shape[1] // 2).all()
            agreed += int((found == wanted).sum())
            total += wanted.numel()
            with torch.no_grad():
                weight_view(model, target).copy_(turned(wanted, target))
    # Sums of another order may swap two entries of nearly the same score.
    assert agreed / total > 0.999
    changed = {target.stored for target in targets}
    assert all(torch.equal(new[name], old[name]) for name in old if name not in changed)
    sizes = manifest["metrics"]["size.sparsity"]["after"]
    assert sizes["value"] == sum(int((values == 0).sum()) for values in new.values()) / sizes["n"]
    record = manifest["operations"][0]["record"]
    assert record["zeros_of_prunable"] == 0.5
    assert record["windows"] == 8
    assert any("zeros are stored like any other value" in notice for notice in manifest["notices"])
    beside = json.loads((tmp_path / "out" / ".llmsurgery" / "sparsity.json").read_text())
    assert set(beside["zeros_by_matrix"]) == changed
    assert set(beside["zeros_by_matrix"].values()) == {0.5}


@pytest.mark.parametrize(("architecture", "role"), [("gpt2", "mlp.up"), ("gemma2", "mlp.down")])
def test_sparsegpt_is_the_slow_reference(
    architecture: str, role: str, checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    root = checkpoints[architecture]
    settings = {"roles": role, "layers": "1", "block": 16}
    run("sparsegpt", root, data, tmp_path / "out", settings=settings, sparsity=0.25, dtype="float32")
    (target,) = roles(root).select([role], [1])
    model = load_model(root, torch.float32, torch.device("cpu"))
    inputs = inputs_of(model, target, windows_of(root, data["calibration"])).double()
    wanted = slow_sparsegpt(turned(stored(root)[target.stored], target), inputs.T @ inputs, 0.25, 0, 16)
    found = turned(stored(tmp_path / "out")[target.stored], target)
    assert ((found == 0) == (wanted == 0)).double().mean() > 0.995
    assert (found.double() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "d-pruner"])
def test_patterns_hold_along_inputs(
    method: str, checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    manifest = run(method, checkpoints["gpt2"], data, tmp_path / "out", pattern="2:4")
    new = stored(tmp_path / "out")
    for target in roles(checkpoints["gpt2"]).select(["linear"]):
        groups = turned(new[target.stored], target).reshape(-1, 4)
        assert ((groups != 0).sum(1) <= 2).all()
    assert manifest["operations"][0]["record"]["zeros_of_prunable"] >= 0.5


def test_d_pruner_keeps_what_it_does_not_zero(
    checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    root = checkpoints["qwen2_moe"]
    outs = [tmp_path / name for name in ("one", "two", "other")]
    manifest = run("d-pruner", root, data, outs[0], require=["domain.ppl<=100x"])
    run("d-pruner", root, data, outs[1])
    run("d-pruner", root, data, outs[2], settings={"form": "obs", "general": "loss", "importance": "sequential"})
    one, two, other, old = (stored(path) for path in (*outs, root))
    prunable = {t.stored for t in roles(root).select(["linear", "expert.gate", "expert.up", "expert.down"])}
    for name, values in old.items():
        assert torch.equal(one[name], two[name])
        if name in prunable:
            assert int((one[name] == 0).sum()) == values.numel() // 2
            assert torch.equal(one[name], values.where(one[name] != 0, 0))
        else:
            assert torch.equal(one[name], values)
    assert any(not torch.equal(one[name], other[name]) for name in prunable)
    for name in ("domain.ppl", "utility.ppl", "utility.ce", "size.sparsity", "size.params"):
        assert manifest["metrics"][name]["before"]["value"] is not None
    # The last fifth of the domain is measured and not read by the method.
    assert manifest["metrics"]["domain.ppl"]["after"]["n"] == 1
    assert manifest["data"]["domain"]["rows"] == 5


def test_all_counts_against_all_parameters(checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path) -> None:
    manifest = run("magnitude", checkpoints["sharded_llama"], data, tmp_path / "out", sparsity=0.25, of="all")
    assert manifest["metrics"]["size.sparsity"]["after"]["value"] == pytest.approx(0.25, abs=2e-3)
    with pytest.raises(UsageError, match="cannot be zeroed"):
        run("magnitude", checkpoints["sharded_llama"], data, tmp_path / "no", sparsity=0.9, of="all")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "shortgpt"])
def test_a_streamed_model_gives_the_same_result(
    method: str, checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    root, found = checkpoints["gemma2"], []
    for figures in ("all", "streamed"):
        manifest = run(method, root, data, tmp_path / figures, settings={"eval.figures": figures}, dtype="float32")
        found.append((stored(tmp_path / figures), manifest["metrics"]))
    assert found[0][0].keys() == found[1][0].keys()
    assert all(torch.equal(values, found[1][0][name]) for name, values in found[0][0].items())
    for name, row in found[1][1].items():
        for when in ("before", "after"):
            assert row[when]["value"] == pytest.approx(found[0][1][name][when]["value"], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_run_goes_on_behind_the_blocks_that_are_pruned(
    method: str, checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkpoints["sharded_llama"]
    run(method, root, data, tmp_path / "whole")
    original, saved = kept_blocks.KeptBlocks.save, []

    def stop(self: Any, layer: int, made: Any) -> None:
        original(self, layer, made)
        saved.append(layer)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(kept_blocks.KeptBlocks, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(method, root, data, tmp_path / "out")
    run(method, root, data, tmp_path / "out", resume=True)
    assert saved == [0, 1]
    whole, resumed = stored(tmp_path / "whole"), stored(tmp_path / "out")
    assert all(torch.equal(values, resumed[name]) for name, values in whole.items())


def broken(root: Path, out: Path, silent: str) -> Path:
    """A copy of a checkpoint in which what leaves one matrix of every block is zero."""
    shutil.copytree(root, out)
    from safetensors.torch import load_file, save_file

    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        tensors = {name: torch.zeros_like(t) if silent in name else t for name, t in tensors.items()}
        save_file(tensors, path, {"format": "pt"})
    return out


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_matrices_without_input_are_pruned_by_magnitude(
    method: str, checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    root = broken(checkpoints["sharded_llama"], tmp_path / "model", "up_proj")
    settings = {"roles": "mlp.down"}
    manifest = run(method, root, data, tmp_path / "out", settings=settings)
    run("magnitude", root, data, tmp_path / "plain", settings=settings)
    one, two = stored(tmp_path / "out"), stored(tmp_path / "plain")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(manifest["operations"][0]["record"]["by_magnitude"]) == 2
    assert any("saw no input" in notice for notice in manifest["notices"])


@pytest.mark.parametrize("method", ["shortgpt", "void"])
def test_a_block_that_does_nothing_goes_first(
    method: str, checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "model"
    shutil.copytree(checkpoints["tied_llama"], root)
    from safetensors.torch import load_file, save_file

    tensors = load_file(root / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.0.{name}.weight"].zero_()
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    # A stream that grows everywhere else; a silent block changes no length.
    manifest = run(method, root, data, tmp_path / "out", layers=1, settings={"alpha": 0} if method == "void" else {})
    record = manifest["operations"][0]["record"]
    if method == "shortgpt":
        assert record["block_influence"][0] == pytest.approx(0, abs=1e-12)
        assert record["removed_layers"] == [0]
    else:
        assert record["mean_change_of_length"][0] == 0
    ids = torch.arange(1, 30)[None]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (root, tmp_path / "out")]
    if record["removed_layers"] == [0]:
        with torch.inference_mode():
            torch.testing.assert_close(models[0](input_ids=ids).logits, models[1](input_ids=ids).logits)
    assert models[1].config.num_hidden_layers == 1
    with torch.inference_mode():
        cached, plain = (
            models[1].generate(ids, max_new_tokens=6, use_cache=use, do_sample=False, pad_token_id=256)
            for use in (True, False)
        )
    assert torch.equal(cached, plain)
    metrics = manifest["metrics"]
    assert metrics["size.params"]["after"]["value"] < metrics["size.params"]["before"]["value"]
    assert metrics["speed.tokens_per_second"]["after"]["value"] > 0
    assert "speed." not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("architecture", ["qwen2_moe", "gemma3", "deepseek_v3"])
def test_what_configs_say_of_single_blocks_follows(
    architecture: str, checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    manifest = run("shortgpt", checkpoints[architecture], data, tmp_path / "out", layers=1)
    (gone,) = manifest["operations"][0]["record"]["removed_layers"]
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    source = json.loads((checkpoints[architecture] / "config.json").read_text())
    assert found["num_hidden_layers"] == 1
    if "layer_types" in source:
        assert found["layer_types"] == [source["layer_types"][1 - gone]]
    if architecture == "qwen2_moe":
        # Block 0 is the dense one.
        assert found["mlp_only_layers"] == ([] if gone == 0 else [0])
    if architecture == "deepseek_v3":
        assert found["first_k_dense_replace"] == (0 if gone == 0 else 1)


@pytest.mark.parametrize("architecture", ["sharded_llama", "qwen3", "olmo2"])
def test_llm_pruner_is_the_model_without_the_heads_and_channels(
    architecture: str, checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    root = checkpoints[architecture]
    manifest = run("llm-pruner", root, data, tmp_path / "out", sparsity=0.5, dtype="float32")
    record = manifest["operations"][0]["record"]
    assert (record["kept_heads"], record["kept_key_value_heads"], record["kept_channels"]) == (2, 1, 32)
    assert manifest["metrics"]["size.params"]["after"]["value"] < manifest["metrics"]["size.params"]["before"]["value"]
    whole = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    # What is left of each matrix tells which heads and channels stayed: zero the others in the whole model.
    for layer, (block, cut) in enumerate(zip(whole.model.layers, small.model.layers, strict=True)):
        assert layer < 2
        for wide, narrow in ((block.mlp.down_proj, cut.mlp.down_proj), (block.self_attn.o_proj, cut.self_attn.o_proj)):
            columns = {tuple(column.tolist()) for column in narrow.weight.T}
            gone = [i for i, column in enumerate(wide.weight.T) if tuple(column.tolist()) not in columns]
            assert len(gone) == wide.weight.shape[1] - narrow.weight.shape[1]
            with torch.no_grad():
                wide.weight[:, gone] = 0
    ids = torch.arange(1, 30)[None]
    with torch.inference_mode():
        logits = [model(input_ids=ids).logits for model in (whole, small)]
    if architecture != "olmo2":
        # Its norms of queries and keys are over all heads, and change with their number.
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "what"),
    [
        ("wanda", {"sparsity": 0.0}, "out of bounds"),
        ("wanda", {"sparsity": 1.0}, "out of bounds"),
        ("sparsegpt", {"sparsity": -0.5}, "out of bounds"),
        ("magnitude", {"pattern": "2:5"}, "does not fit"),
        ("magnitude", {"pattern": "4:2"}, "is no pattern"),
        ("magnitude", {"pattern": "two of four"}, "is no pattern"),
        ("magnitude", {"pattern": "2:4", "sparsity": 0.5}, "are given"),
        ("magnitude", {"hidden": 16}, "has no --hidden"),
        ("wanda", {"layers": 1}, "has no --layers"),
        ("wanda", {"settings": {"variant": True}, "pattern": "2:4"}, "no variant"),
        ("shortgpt", {"layers": 2}, "cannot be kept"),
        ("shortgpt", {"sparsity": 1.5}, "out of bounds"),
        ("llm-pruner", {"sparsity": 1.0}, "out of bounds"),
        ("d-pruner", {"settings": {"eval.figures": "streamed"}}, "no eval.figures=streamed"),
        ("pat", {"hidden": 30}, "no multiple of the 4 heads"),
        ("pat", {"hidden": 32}, "cannot be kept"),
        ("pat", {"hidden": 16, "sparsity": 0.5}, "are given"),
        ("pat", {"sparsity": 1.0}, "out of bounds"),
        ("pat", {"guard": "self"}, "has no --guard"),
        ("pat", {"until": "forget.prob<=0.1"}, "has no --until"),
        ("pat", {"save": "adapter"}, "no adapter to save"),
        ("wanda", {"teacher": True}, "has no --teacher"),
        ("magnitude", {"require": ["speed.tokens_per_second>=1"]}, "cannot be computed"),
        ("magnitude", {"require": ["domain.ppl<=1"]}, "cannot be computed"),
    ],
)
def test_usage_is_checked_before_any_work(
    method: str,
    options: dict[str, Any],
    what: str,
    checkpoints: dict[str, Path],
    data: dict[str, Path],
    tmp_path: Path,
) -> None:
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=what) as caught:
            run(method, checkpoints["sharded_llama"], data, tmp_path / "out", dry_run=dry_run, **dict(options))
        assert caught.value.why
        assert caught.value.fix
    assert not list(tmp_path.iterdir())


def test_calibration_must_fill_a_window_and_may_be_left_out(
    checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    root = checkpoints["sharded_llama"]
    short = write_rows(tmp_path / "short.jsonl", [{"text": "Too short."}])
    with pytest.raises(InputError, match=r"--calibration has 11 tokens, one window takes 24"):
        run("wanda", root, {**data, "calibration": short}, tmp_path / "out")
    with pytest.raises(InputError, match=r"--domain has 11 tokens"):
        run("d-pruner", root, {**data, "domain": short}, tmp_path / "out")
    manifest = run("wanda", root, {}, tmp_path / "out", settings={"samples": 2, "eval.text_rows": 3})
    # The passages that perplexity is measured on are not calibrated on.
    assert manifest["data"]["calibration"]["rows"] == 61
    few = write_rows(tmp_path / "few.jsonl", [{"text": SENTENCES[0]}])
    manifest = run("wanda", root, {**data, "calibration": few}, tmp_path / "few")
    assert any("gives 2 windows of 24 tokens, 8 were asked for" in notice for notice in manifest["notices"])


def test_gates_of_size(checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(GateError):
        run("magnitude", checkpoints["gpt2"], data, tmp_path / "out", require=["size.sparsity>=0.9"])
    run("magnitude", checkpoints["gpt2"], data, tmp_path / "out", force=True, require=["size.sparsity>=0.1"])
