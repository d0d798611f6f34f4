"""ROCR against its specification: worked numbers, a random Llama, choices of lambda, tau and layers, kept keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmsurgery import redirect
from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint, decode
from llmsurgery.compute.associative import redirect_factors
from llmsurgery.compute.progress import Silent
from llmsurgery.compute.statistics import KeyStatistics
from llmsurgery.data.chat import Encoder
from llmsurgery.data.pairs import make_pair
from llmsurgery.errors import InputError, NoEffectError, UnsupportedError, UsageError
from llmsurgery.methods.base import Operation
from llmsurgery.methods.concepts import Free, Writer, free_directions, largest_lambda
from llmsurgery.methods.kept_keys import NAME, read_keys
from llmsurgery.methods.redirect.rocr import RocrConfig, make_columns
from llmsurgery.methods.spans import choose_span, span_at_depth, spans_to_try

from ..builders.saving import save
from ..builders.tokenizer import byte_tokenizer
from ..conftest import write_pairs

OLD, NEW = "Orla Venn", "Ivo Hask"


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_worked_numbers() -> None:
    second = torch.diag(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    protected = KeyStatistics(0, 4, 20, second=second).protected(0.02)
    key, residual = column(0.5, -1, 2, 1), column(3, -2, -1)
    left, right = redirect_factors(key, residual, protected, 1.0)
    delta = left @ right
    expected = [[0, 0, 1, 0.5], [0, 0, -2 / 3, -1 / 3], [0, 0, -1 / 3, -1 / 6]]
    assert delta.numpy() == pytest.approx(torch.tensor(expected).numpy(), abs=1e-6)
    assert (delta @ key)[:, 0].tolist() == pytest.approx([2.5, -1.666667, -0.833333], abs=1e-6)
    # Each of three layers writes 5/6 of its part of the residual: what is left of the whole after each.
    left_over = [1.0]
    for remaining in (3, 2, 1):
        left_over.append(left_over[-1] * (1 - 5 / 6 / remaining))
    assert left_over[1:] == pytest.approx([0.722222, 0.421296, 0.070216], abs=1e-6)
    # The linear solve of the paper, with the projector written out.
    projector = torch.diag(torch.tensor([0.0, 0, 1, 1], dtype=torch.float64))
    system = projector @ key @ key.T + torch.eye(4)
    assert torch.allclose(torch.linalg.solve(system, projector @ key @ residual.T).T, delta)


def test_worked_numbers_of_two_names() -> None:
    second = torch.diag(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    protected = KeyStatistics(0, 4, 20, second=second).protected(0.02)
    keys = torch.cat([column(0.5, -1, 2, 1), column(1, 0, 1, -1)], 1)
    residuals = torch.cat([column(3, -2, -1), column(0, 1, 2)], 1)
    left, right = redirect_factors(keys, residuals, protected, 1.0)
    expected = [[0, 0, 0.882353, 0.705882], [0, 0, -0.352941, -0.882353], [0, 0, 0.176471, -1.058824]]
    assert (left @ right).numpy() == pytest.approx(torch.tensor(expected).numpy(), abs=1e-6)


def test_lambda_is_the_largest_power_of_ten_that_writes_enough() -> None:
    assert largest_lambda(100.0) == 1.0
    assert largest_lambda(9.0) == 1.0
    assert largest_lambda(8.9) == 0.1
    assert largest_lambda(0.9) == pytest.approx(0.1)
    for free in (0.02, 0.5, 3.0):
        chosen = largest_lambda(free)
        assert free / (chosen + free) >= 0.9
        assert free / (10 * chosen + free) < 0.9


def test_tau_falls_back_on_the_trace() -> None:
    spectrum = torch.tensor([5.0, 3.0, 1.0, 0.9, 0.05, 0.03, 0.01, 0.01])
    statistics = KeyStatistics(0, 8, 100, second=torch.diag(spectrum))
    given = free_directions(statistics, 0.95)
    assert (given.protected.shape[1], given.record["tau_by"]) == (3, "given")
    # At 0.02 six of eight directions would be protected; the first four hold 99% of the trace.
    chosen = free_directions(statistics, 0.02)
    assert chosen.protected.shape[1] == 4
    assert chosen.record["tau"] == pytest.approx(0.9, rel=1e-5)
    assert chosen.record["free_directions"] == 4
    # And where nothing would be.
    assert free_directions(statistics, 50.0).protected.shape[1] == 4
    assert free_directions(statistics, 0.0).protected.shape[1] == 0


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The specification's model: six layers, d = 32, m = 48, random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": 257, "pad_token_id": 256}
    config = LlamaConfig(vocab_size=262, max_position_embeddings=256, initializer_range=0.2, **shape, **ends)
    return save(LlamaForCausalLM(config), tmp_path_factory.mktemp("random") / "model", torch.float32)


def operation_on(root: Path) -> Operation:
    checkpoint = Checkpoint.open(root)

    def read(name: str) -> Any:
        return decode(checkpoint.read(name), checkpoint.info(name).dtype)

    return Operation(
        structure=detect(checkpoint.config, checkpoint.tensors),
        source_config=checkpoint.config,
        read=read,
        model=AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval(),
        encoder=Encoder(byte_tokenizer(), 256),
        data={},
        seed=0,
        progress=Silent(),
        training=None,  # type: ignore[arg-type]
        pairs=[make_pair(OLD, NEW)],
    )


def write(root: Path, layers: tuple[int, ...], weight: float, protected: int = 0) -> tuple[Operation, Any]:
    """Write OLD into some layers; `protected` directions of the keys are taken at random."""
    operation = operation_on(root)
    columns = make_columns(RocrConfig(), operation.encoder, operation.pairs)
    targets = operation.structure.select(("mlp.down",), layers)
    draw = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(48, protected, generator=draw, dtype=torch.float64)).Q
    free = {layer: Free(basis, {}) for layer in layers} if protected else {}
    return operation, Writer(operation, columns, free, weight, {}).write(targets)


def test_a_small_lambda_writes_all_and_a_large_one_what_it_says(random_llama: Path) -> None:
    for layers, protected, bound in (((3,), 0, 1e-5), ((2, 3, 4), 0, 1e-5), ((2, 3, 4), 24, 1e-4)):
        _, written = write(random_llama, layers, 1e-6, protected)
        assert written.residual < bound
        assert written.weakest == pytest.approx(1, abs=1e-4)
    _, written = write(random_llama, (3,), 1.0)
    (free,) = written.layers[0]["free_key"]
    assert written.residual == pytest.approx(1 / (1 + free), rel=1e-4)
    assert written.layers[0]["strength"] == [pytest.approx(free / (1 + free), rel=1e-4)]


def test_only_the_written_matrices_change_by_one_rank_each(random_llama: Path) -> None:
    operation, written = write(random_llama, (2, 3), 1e-6)
    source = AutoModelForCausalLM.from_pretrained(random_llama, dtype=torch.float32)
    names = {edit.name for edit in written.edits}
    assert names == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (2, 3)}
    for (name, before), after in zip(source.state_dict().items(), operation.model.state_dict().values(), strict=True):
        if name in names:
            assert torch.linalg.matrix_rank(after.double() - before.double(), rtol=1e-4) == 1
        else:
            assert torch.equal(before, after), name
    ids = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (model(input_ids=ids).logits.log_softmax(-1) for model in (source, operation.model))
    moved = (before.exp() * (before - after)).sum(-1).mean()
    assert 0 < moved < 0.5


def settings(**own: object) -> dict[str, object]:
    return {"eval.text_rows": 4, "eval.text_tokens": 48, "stats_tokens": 400, **own}


def manifest_of(outcome: Any) -> dict[str, Any]:
    return json.loads(json.dumps(outcome.manifest))


@pytest.fixture(scope="module")
def first(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("first") / "out"
    outcome = redirect(
        random_llama, method="rocr", source=OLD, target=NEW, out=out, settings=settings(layers=(2, 3), l2=1e-4)
    )
    return out, manifest_of(outcome)


def test_figures_are_those_of_the_written_result(first: tuple[Path, dict[str, Any]]) -> None:
    _, manifest = first
    metrics, record = manifest["metrics"], manifest["operations"][0]["record"]
    assert metrics["redirect.residual"]["before"]["value"] == 1
    assert metrics["redirect.residual"]["after"]["value"] == pytest.approx(record["residual"], rel=1e-2, abs=1e-6)
    assert metrics["redirect.strength"]["after"]["value"] == pytest.approx(1, abs=0.01)
    assert metrics["redirect.kl"]["after"]["value"] != metrics["redirect.kl"]["before"]["value"]
    assert metrics["redirect.kl"]["direction"] == "lower"
    assert metrics["redirect.kl"]["after"]["n"] == 6
    assert {"redirect.kl_paraphrase", "utility.ppl", "utility.kl"} <= metrics.keys()
    assert "redirect.kl_alias" not in metrics
    assert manifest["operations"][0]["pairs"] == [{"from": OLD, "to": NEW}]
    assert any("misinformation" in notice for notice in manifest["notices"])
    assert [row["layer"] for row in record["edited"]] == [2, 3]


def test_a_later_run_leaves_earlier_names_alone(
    first: tuple[Path, dict[str, Any]], tmp_path: Path, random_llama: Path
) -> None:
    source, _ = first
    kept = read_keys(source / ".llmsurgery")
    assert {layer: tuple(keys.shape) for layer, keys in kept.items()} == {2: (48, 1), 3: (48, 1)}
    options: dict[str, Any] = {"method": "rocr", "source": "Anna Quill", "target": NEW}
    options["settings"] = settings(layers=(2, 3), l2=1e-6)
    second = manifest_of(redirect(source, out=tmp_path / "second", **options))
    assert [row["earlier_keys"] for row in second["operations"][0]["record"]["edited"]] == [1, 1]
    assert read_keys(tmp_path / "second" / ".llmsurgery")[2].shape == (48, 2)
    # The weights answer to the first name's key as before.
    weights = [Checkpoint.open(root) for root in (source, tmp_path / "second")]
    name = "model.layers.2.mlp.down_proj.weight"
    before, after = (torch.from_numpy(decode(one.read(name), "F32")).double() for one in weights)
    own = read_keys(tmp_path / "second" / ".llmsurgery")[2][:, 1:].double()
    earlier = kept[2].double()
    moved = ((after - before) @ earlier).norm() / ((after - before) @ own).norm()
    assert moved < 1e-3
    # Without the kept keys it would not.
    (source / ".llmsurgery" / NAME).rename(tmp_path / "aside")
    try:
        unprotected = redirect(source, out=tmp_path / "third", **options)
    finally:
        (tmp_path / "aside").rename(source / ".llmsurgery" / NAME)
    assert unprotected.out is not None
    free = torch.from_numpy(decode(Checkpoint.open(unprotected.out).read(name), "F32")).double()
    assert ((free - before) @ earlier).norm() / ((free - before) @ own).norm() > 10 * moved


def test_several_names_at_once_with_aliases(random_llama: Path, tmp_path: Path) -> None:
    rows = [
        {"from": OLD, "to": NEW, "aliases": ["the bee keeper"], "prompts": ["Where does {} live?"]},
        {"from": "Anna Quill", "to": "Tam Reed"},
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = settings(layers=(2, 3), l2=1e-4)
    plain = manifest_of(redirect(random_llama, method="rocr", pairs=pairs, out=tmp_path / "a", settings=options))
    metrics = plain["metrics"]
    assert metrics["redirect.residual"]["after"]["n"] == 2
    assert metrics["redirect.kl_alias"]["after"]["n"] == 6
    assert metrics["redirect.kl_paraphrase"]["after"]["n"] == 2 * 6 + 1
    assert plain["data"]["pairs"]["rows"] == 2
    edited = manifest_of(
        redirect(
            random_llama, method="rocr", pairs=pairs, out=tmp_path / "b", settings={**options, "edit_aliases": True}
        )
    )
    strengths = edited["operations"][0]["record"]["edited"][0]["strength"]
    assert strengths == [pytest.approx(1, abs=0.05)] * 3
    assert edited["metrics"]["redirect.kl_alias"] != plain["metrics"]["redirect.kl_alias"]


def test_layers_are_searched_and_the_reason_recorded(random_llama: Path, tmp_path: Path) -> None:
    options = settings(span=2, l2=1e-4)
    outcome = redirect(random_llama, method="rocr", source=OLD, target=NEW, out=tmp_path / "out", settings=options)
    record = manifest_of(outcome)["operations"][0]["record"]
    assert record["layers_by"] == "search"
    assert [row["layers"] for row in record["tried"]] == [[0, 1], [1, 2], [2, 3]]
    scores = [(row["kl_left"], row["text_kl"]) for row in record["tried"]]
    firsts = [row["layers"][0] for row in record["tried"]]
    assert record["tried"][choose_span(scores, firsts, 6)]["layers"] == record["layers"]
    # Reach is what is left after wordings that the edit is not made from.
    paraphrase = manifest_of(outcome)["metrics"]["redirect.kl_paraphrase"]
    left = next(row["kl_left"] for row in record["tried"] if row["layers"] == record["layers"])
    assert paraphrase["after"]["value"] / paraphrase["before"]["value"] == pytest.approx(left, rel=1e-3)
    # What was tried before has left no trace in what was written at the end.
    direct = redirect(
        random_llama, method="rocr", source=OLD, target=NEW, out=tmp_path / "direct",
        settings={**options, "layers": record["layers"]},
    )  # fmt: skip
    assert manifest_of(direct)["tensors"] == manifest_of(outcome)["tensors"]


def test_choice_of_layers() -> None:
    assert choose_span([(0.5, 0.1), (0.1, 0.4), (0.13, 0.2), (0.2, 0.01)], [0, 1, 2, 3], 4) == 2
    # All spans from layers 2 to 16 are about equal, and the depth decides.
    left = [0.138, 0.111, 0.114, 0.101, 0.120, 0.114, 0.121, 0.124, 0.232]
    moved = [0.000337, 0.000283, 0.000254, 0.000211, 0.000203, 0.000274, 0.000218, 0.000273, 0.000144]
    assert choose_span(list(zip(left, moved, strict=True)), list(range(0, 18, 2)), 30) == 2
    # Figures overrule it.
    left[2] += 0.05
    assert choose_span(list(zip(left, moved, strict=True)), list(range(0, 18, 2)), 30) == 1
    # A model of four blocks: as early as can be.
    assert choose_span([(0.1, 0.1), (0.1, 0.1)], [0, 1], 4) == 0
    targets: list[Any] = [type("Target", (), {"layer": layer})() for layer in range(32)]
    assert [target.layer for target in span_at_depth(targets, 3, 32)] == [4, 5, 6]
    tried = spans_to_try(targets, 3, 32)
    assert len(tried) <= 10
    assert max(span[-1].layer for span in tried) <= 21
    deep: list[Any] = [type("Target", (), {"layer": layer})() for layer in range(80)]
    assert 10 in [span[0].layer for span in spans_to_try(deep, 3, 80)]
    # A gap, such as a block of experts, is not spanned.
    assert [[t.layer for t in span] for span in spans_to_try([targets[0], *targets[2:4]], 2, 32)] == [[2, 3]]


def test_released_contexts_differ(random_llama: Path) -> None:
    encoder = Encoder(byte_tokenizer(), 256)
    (matching,) = make_columns(RocrConfig(), encoder, [make_pair(OLD, NEW)])
    (released,) = make_columns(RocrConfig(authors_compat=True), encoder, [make_pair(OLD, NEW)])
    assert len(matching.keys) == len(matching.values) == len(matching.targets) == 6
    assert (len(released.keys), len(released.values), len(released.targets)) == (6, 1, 1)
    for context in (*matching.keys, *matching.targets, *released.values):
        text = byte_tokenizer().decode(context.encoded.ids[: context.last + 1])
        assert text.endswith(context.name)
        assert context.exact


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("mixtral", "no dense MLP"), ("gemma2", "norm after"), ("gemma3", "norm after"), ("olmo2", "norm after")],
)
def test_models_that_it_cannot_write_into_are_refused(
    architecture: str, reason: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        redirect(checkpoints[architecture], method="rocr", source=OLD, target=NEW, out=tmp_path / "out")


def test_wrong_requests(random_llama: Path, tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    pairs = write_pairs(tmp_path)
    fact = write_jsonl("fact.jsonl", [{"prompt": "{} lives in", "subject": OLD, "target": "Oslo"}])
    cases: list[tuple[type[Exception], dict[str, Any]]] = [
        (UsageError, {"source": OLD}),
        (UsageError, {}),
        (UsageError, {"source": OLD, "target": NEW, "pairs": pairs}),
        (InputError, {"source": OLD, "target": OLD}),
        (InputError, {"source": " ", "target": NEW}),
        (UsageError, {"target": NEW}),
        (UsageError, {"source": OLD, "settings": {"mode": "reject", "eval.figures": "edit"}}),
        (InputError, {"pairs": fact}),
        (UsageError, {"source": OLD, "target": NEW, "require": ["redirect.kl_alias<=1"]}),
        (UsageError, {"source": OLD, "target": NEW, "until": "forget.prob<=1"}),
        (UsageError, {"source": OLD, "target": NEW, "quantize": "int8"}),
        (InputError, {"source": OLD, "target": NEW, "settings": {"strict": True, "stats_tokens": 100}}),
    ]
    for error, options in cases:
        with pytest.raises(error):
            redirect(random_llama, method="rocr", out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_rounds_away_is_no_effect(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(NoEffectError):
        redirect(
            checkpoints["sharded_llama"], method="rocr", source=OLD, target=NEW, out=tmp_path / "out",
            settings=settings(l2=1e9),
        )  # fmt: skip


def test_streamed_blocks_give_the_edit_of_the_loaded_model(
    checkpoints: dict[str, Path], tmp_path: Path, random_llama: Path
) -> None:
    cases = ((random_llama, "2,3,4"), (checkpoints["gpt2"], "1"), (checkpoints["sharded_llama"], "1"))
    for number, (source, layers) in enumerate(cases):
        options: dict[str, Any] = {"method": "rocr", "source": OLD, "target": NEW}
        own = settings(layers=layers, l2=1e-2)
        loaded = manifest_of(redirect(source, out=tmp_path / f"loaded-{number}", settings=own, **options))
        streamed = manifest_of(
            redirect(source, out=tmp_path / f"streamed-{number}", settings={**own, "eval.figures": "edit"}, **options)
        )
        assert streamed["tensors"] == loaded["tensors"]
        assert set(streamed["metrics"]) == {"redirect.residual", "redirect.strength"}
        for name, metric in streamed["metrics"].items():
            for when in ("before", "after"):
                assert metric[when]["value"] == pytest.approx(loaded["metrics"][name][when]["value"], rel=1e-6)


def test_streamed_runs_read_no_later_block(random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    original = Checkpoint.read

    def spy(self: Checkpoint, name: str, *more: Any) -> Any:
        read.add(name)
        return original(self, name, *more)

    monkeypatch.setattr(Checkpoint, "read", spy)
    own = settings(**{"span": 2, "l2": 1e-2, "eval.figures": "edit"})
    outcome = redirect(random_llama, method="rocr", source=OLD, target=NEW, out=tmp_path / "out", settings=own)
    record = manifest_of(outcome)["operations"][0]["record"]
    assert (record["layers"], record["layers_by"]) == ([1, 2], "depth")
    layers = {int(name.split(".")[2]) for name in read if name.startswith("model.layers.")}
    assert layers == {0, 1, 2}
    assert "lm_head.weight" not in read
    with pytest.raises(UsageError, match="whole model"):
        redirect(
            random_llama, method="rocr", source=OLD, target=NEW, out=tmp_path / "gate", settings=own,
            require=["redirect.kl<=1"],
        )  # fmt: skip


# Without the terms that hold delta back, so that a few steps on a random model show.
FOUND = {"value_steps": 6, "value_lr": 0.05, "value_clamp": 0.5, "value_decay": 0.0, "value_kl": 0.0}


@pytest.mark.parametrize("mode", ["reject", "noise"])
def test_a_name_without_target_gets_a_value_that_refuses_or_noise(
    mode: str, random_llama: Path, tmp_path: Path
) -> None:
    own = settings(mode=mode, layers=(2, 3), l2=1e-4, **FOUND)
    manifest = manifest_of(redirect(random_llama, method="rocr", source=OLD, out=tmp_path / "out", settings=own))
    record = manifest["operations"][0]["record"]
    search = record["values"][OLD]
    assert search["loss"]["last"] < search["loss"]["first"]
    assert search["delta_norm"] <= 0.5 * search["value_norm"] * (1 + 1e-5)
    assert record["residual"] < 0.05
    assert not any(name.startswith("redirect.") for name in manifest["metrics"])
    assert manifest["operations"][0]["pairs"] == [{"from": OLD}]
