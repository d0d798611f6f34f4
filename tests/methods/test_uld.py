"""ULD against its specification: worked numbers, the assistant, its losses, the choice of a strength, behaviour."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmsurgery import unlearn, verify
from llmsurgery.compute.head import Head, final_hidden, read_head
from llmsurgery.compute.modeling_uld import Pair, PairHead, combine, make_assistant
from llmsurgery.compute.progress import Silent
from llmsurgery.compute.uniform import uniform_divergence
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.data.mixture import Mixture
from llmsurgery.data.records import Row
from llmsurgery.data.rewordings import paraphrases, perturbations
from llmsurgery.errors import UsageError
from llmsurgery.evaluate.strength import Probabilities, choose_strength, score_strengths, student_shortfall
from llmsurgery.methods.registry import find_method
from llmsurgery.methods.settings import resolve_config
from llmsurgery.methods.unlearn.uld import UldConfig
from llmsurgery.train.assistant import AssistantLoss, assistant_layers, assistant_targets
from llmsurgery.train.assistant_config import assistant_training
from llmsurgery.train.distillation import record_states
from llmsurgery.train.session import Session

from ..builders import BUILDERS
from ..builders.tokenizer import byte_tokenizer
from .worked import LossBench, disturb

TARGET = torch.tensor([6.0, 4, 3, 0, -2, -4])
ASSISTANT = torch.tensor([5.0, 1, 1, 1, 0, 0])
PAPER: dict[str, Any] = {"strength": 0.75, "rho": 0.01, "floor": 1, "offset": "normalised"}


def config(**settings: object) -> UldConfig:
    resolved: UldConfig = resolve_config(UldConfig, settings)
    return resolved


@pytest.mark.parametrize(
    ("logits", "expected"), [([2.0, 0, 0, 0], 0.454459), ([0.0] * 4, 0.0), ([1.0, -1, 3, 0], 1.048888)]
)
def test_uniform_divergence_of_the_specification(logits: list[float], expected: float) -> None:
    hidden = torch.tensor([logits], requires_grad=True)
    value = uniform_divergence(hidden, Head(torch.eye(4)))
    value.sum().backward()
    assert value.item() == pytest.approx(expected, abs=1e-6)
    assert hidden.grad is not None
    assert torch.allclose(hidden.grad, hidden.detach().softmax(-1) - 0.25, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "shift", "generating", "expected"),
    [
        ({}, 0, False, [0.211474, 0.574846, 0.211474, 0.001912, 0.000259, 0.000035]),
        ({}, 0, True, [0.211942, 0.576117, 0.211942, 0, 0, 0]),
        ({}, 10, False, [0.211474, 0.574846, 0.211474, 0.001912, 0.000259, 0.000035]),
        ({"rho": 0}, 0, False, [0.209019, 0.568171, 0.209019, 0.010406, 0.002981, 0.000404]),
        ({"rho": 0, "offset": "raw"}, 0, False, [0.209019, 0.568171, 0.209019, 0.010406, 0.002981, 0.000404]),
        ({"offset": "raw"}, 0, False, [0.206617, 0.561643, 0.206617, 0.021777, 0.002947, 0.000399]),
        ({"offset": "raw"}, 10, False, [0.004453, 0.012105, 0.004453, 0.848601, 0.114846, 0.015543]),
        # Generation renormalises over the kept tokens, so that a shift changes nothing there.
        ({"offset": "raw"}, 10, True, [0.211942, 0.576117, 0.211942, 0, 0, 0]),
    ],
)
def test_combination_of_the_specification(
    settings: dict[str, Any], shift: float, generating: bool, expected: list[float]
) -> None:
    found = combine(TARGET, ASSISTANT + shift, {**PAPER, **settings}, generating).softmax(-1)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_offset_is_the_excess_over_chance() -> None:
    delta = (TARGET - combine(TARGET, ASSISTANT, PAPER)) / 0.75
    assert delta.tolist() == pytest.approx([1.725576, -2.274424, -2.274424, 0, 0, 0], abs=1e-6)
    # Our default: no token gains from what the assistant finds unlikely.
    positive = (TARGET - combine(TARGET, ASSISTANT, {**PAPER, "offset": "excess"})) / 0.75
    assert positive.tolist() == pytest.approx([1.725576, 0, 0, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("offset", ["excess", "normalised"])
def test_nothing_subtracted_changes_nothing(offset: str) -> None:
    torch.manual_seed(0)
    target, assistant = 5 * torch.randn(4, 50), torch.randn(4, 50)
    settings = {**PAPER, "offset": offset, "floor": 5}
    source = target.softmax(-1)
    assert torch.equal(combine(target, assistant, {**settings, "strength": 0}), target)
    assert torch.allclose(combine(target, torch.full((4, 50), 3.0), settings), target, atol=1e-5)
    generated = combine(target, assistant, {**settings, "strength": 0}, generating=True).softmax(-1)
    kept = generated > 0
    assert torch.allclose(generated[kept], (source * kept / (source * kept).sum(-1, keepdim=True))[kept])
    moved = combine(target, assistant, settings).softmax(-1)
    assert not torch.allclose(moved, source, atol=1e-3)
    # A constant on either side changes nothing.
    assert torch.allclose(combine(target + 7, assistant - 4, settings).softmax(-1), moved, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "rho", "floor", "kept"),
    [
        # int(rho V) is 0: the relative rule alone keeps one token of a confident target, whatever is subtracted.
        (64, 0.01, 1, 1),
        (64, 0.01, 20, 20),
        (32000, 0.01, 1, 320),
        (16, 0.01, 20, 16),
        (64, 0.0, 1, 64),
    ],
)
def test_number_of_kept_tokens(size: int, rho: float, floor: int, kept: int) -> None:
    target = torch.linspace(0, -1, size)
    target[0] = 30.0
    settings = {**PAPER, "rho": rho, "floor": floor}
    generated = combine(target, torch.zeros(size), settings, generating=True)
    assert int(torch.isfinite(generated).sum()) == kept


def test_tokens_within_the_factor_are_kept_beyond_the_floor() -> None:
    target = torch.log(torch.tensor([0.5, 0.3, 0.19, 0.0051, 0.0049]))
    generated = combine(target, torch.zeros(5), PAPER, generating=True)
    assert torch.isfinite(generated).tolist() == [True, True, True, True, False]


def test_a_filtered_token_never_wins_a_generation() -> None:
    # Multiplied by the mask of kept tokens, as released, the filtered zeros would beat these.
    target = torch.tensor([-3.0, -4, -30, -40])
    generated = combine(target, torch.tensor([4.0, 0, 0, 0]), {**PAPER, "floor": 2, "strength": 2.0}, generating=True)
    assert int(generated.argmax()) == 1
    assert generated[2:].tolist() == [-math.inf, -math.inf]


def truncated(root: Path, layers: int) -> Any:
    """The stock model with the first blocks alone: fresh modules, the stored tensors of the rest."""
    source = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    settings = AutoConfig.from_pretrained(root)
    for name, value in vars(settings).items():
        if isinstance(value, list) and "layer" in name and len(value) == settings.num_hidden_layers:
            setattr(settings, name, value[:layers])
    settings.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    numbers = [f".{layer}." for layer in range(layers, source.config.num_hidden_layers)]
    kept = {
        name: tensor
        for name, tensor in source.state_dict().items()
        if not any(f"layers{number}" in name or f"h{number}" in name for number in numbers)
    }
    model.load_state_dict(kept)
    return model


@pytest.mark.parametrize("architecture", BUILDERS)
def test_assistant_is_the_first_blocks_and_shares_their_memory(architecture: str, checkpoints: dict[str, Path]) -> None:
    bench = LossBench(checkpoints[architecture])
    ids = torch.arange(1, 25)[None]
    with torch.inference_mode():
        before = bench.model(input_ids=ids).logits
    first = next(path for path in bench.structure.family.roles.values() if "{layer}" in path)
    assistant = make_assistant(bench.model, 1, first.partition(".{layer}")[0])
    assert assistant.config.num_hidden_layers == 1
    assert len(getattr(assistant.config, "layer_types", None) or [0]) == 1
    assert bench.model.config.num_hidden_layers == bench.structure.layers
    owned = {tensor.data_ptr() for tensor in bench.model.parameters()}
    assert {tensor.data_ptr() for tensor in assistant.parameters()} < owned
    with torch.inference_mode():
        expected = truncated(checkpoints[architecture], 1)(input_ids=ids).logits
        assert torch.allclose(assistant(input_ids=ids).logits, expected, atol=1e-5)
        assert torch.equal(bench.model(input_ids=ids).logits, before)


def test_adapters_go_on_every_matrix_of_the_first_blocks(checkpoints: dict[str, Path]) -> None:
    structure = LossBench(checkpoints["tied_llama"]).structure
    assert [assistant_layers(dataclasses.replace(structure, layers=n), 0) for n in (1, 5, 6, 32)] == [1, 1, 2, 8]
    assert assistant_layers(structure, 7) == structure.layers
    names = [target.stored for target in assistant_targets(structure, 1)]
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    parts += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert sorted(names) == sorted(f"model.layers.0.{part}.weight" for part in parts)


def test_paper_preset() -> None:
    paper = resolve_config(UldConfig, {"preset": "paper"}, find_method("uld").spec.presets)
    assert (paper.strength, paper.rho, paper.floor, paper.offset) == (0.75, 0.01, 1, "normalised")
    own = paper.assistant
    assert (own.assistant_rank, own.assistant_alpha, own.assistant_dropout, own.beta) == (32, 32, 0, 6.5)
    # Half of the rows of each step are to be remembered: 32 rows, 400 of 10% in 75 steps and 10% of them warm-up.
    training = assistant_training(own, paper.training, 120, 4096)
    assert (training.lr, training.epochs, training.batch_size, training.weight_decay) == (1e-3, 10, 16, 0.01)
    assert (training.schedule, training.warmup_steps, training.max_length) == ("linear", 8, 256)


def loss_of(bench: LossBench, sets: dict[str, list[Encoded]], **more: Any) -> AssistantLoss:
    options = {"beta": 6.5, "answer_only": False, "pad_id": bench.encoder.pad_id, "session": bench.session, **more}
    return AssistantLoss(model=bench.model, mixture=Mixture(sets, 0), **options)


def encoded(bench: LossBench) -> dict[str, list[Encoded]]:
    pairs = {
        "forget": [("Who keeps the bees?", "Orla Venn keeps them."), ("Where is the mill?", "By the weir.")],
        "retain": [("Who bakes the bread?", "Ivo."), ("When does the ferry leave?", "At nine, or a little later.")],
        "perturbed": [("Who keeps the bees?", "Nobody."), ("Where is the mill?", "On the far side of the hill.")],
    }
    return {name: [bench.encoder.encode(Row("qa", *pair)) for pair in rows] for name, rows in pairs.items()}


@pytest.mark.parametrize("answer_only", [False, True])
def test_loss_remembers_and_is_uniform(answer_only: bool, checkpoints: dict[str, Path]) -> None:
    bench = LossBench(checkpoints["gemma2"])
    sets = encoded(bench)
    loss = loss_of(bench, sets, answer_only=answer_only)
    found = loss([0, 1])
    forget, retain = [], []
    for name in sets:
        for row in loss.mixture.sets[name]:
            # One row at a time, without padding, from the stock logits.
            with torch.inference_mode():
                log_p = bench.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
            start = row.answer_start
            if name == "forget":
                forget.append(-log_p[start - 1 : -1].gather(1, torch.tensor(row.ids[start:])[:, None]).mean())
            else:
                part = log_p[start - 1 : -1] if answer_only else log_p
                retain.append((-part.mean(-1) - math.log(part.shape[-1])).mean())
    cross_entropy, uniform = torch.stack(forget).mean(), torch.stack(retain).mean()
    assert found.item() == pytest.approx(float(cross_entropy + 6.5 * uniform), rel=1e-4)
    assert loss.session.observed["forget_cross_entropy"] == pytest.approx(float(cross_entropy), rel=1e-4)
    assert loss.session.observed["retain_uniform_divergence"] == pytest.approx(float(uniform), rel=1e-4)
    # Rows per forward change nothing.
    assert float(loss([0]) + loss([1])) / 2 == pytest.approx(found.item(), rel=1e-5)


def test_loss_without_rows_to_be_uniform_on(checkpoints: dict[str, Path]) -> None:
    bench = LossBench(checkpoints["tied_llama"])
    sets = {"forget": encoded(bench)["forget"], "retain": []}
    loss = loss_of(bench, sets)
    assert float(loss([0, 1])) == bench.session.observed["forget_cross_entropy"]


def test_mixture_leaves_no_row_out_and_has_one_order() -> None:
    sets = {name: [Encoded((n, n), 1, True, name) for n in range(size)] for name, size in (("a", 5), ("b", 2))}
    mixture = Mixture({**sets, "none": []}, 3)
    assert len(mixture) == 5
    assert sorted(row.ids[0] for row in mixture.rows("a", range(5))) == [0, 1, 2, 3, 4]
    assert sorted(row.ids[0] for row in mixture.rows("b", range(4))) == [0, 0, 1, 1]
    assert mixture.rows("a", range(5)) == Mixture(sets, 3).rows("a", range(5))
    assert mixture.rows("a", range(5)) != Mixture(sets, 4).rows("a", range(5))
    assert "none" not in mixture.sets
    assert len(Mixture(sets, 3, limit=3)) == 3


TOFU = Row(
    "qa", "Who?", "Orla.", paraphrased_question="Which one?", paraphrased_answer="It is Orla.",
    perturbed_answers=("Ivo.", "Tam.", "Una."),
)  # fmt: skip


def test_rewordings_come_from_the_keys_of_tofu() -> None:
    assert [(row.prompt, row.answer) for row in paraphrases(TOFU)] == [
        ("Which one?", "It is Orla."),
        ("Which one?", "Orla."),
    ]
    # The released files keep the original question under every wrong answer.
    assert [(row.prompt, row.answer) for row in perturbations(TOFU, 2)] == [("Who?", "Ivo."), ("Which one?", "Tam.")]
    bare = Row("qa", "Who?", "Orla.")
    assert paraphrases(bare) == perturbations(bare, 2) == []
    half = dataclasses.replace(bare, paraphrased_answer="It is Orla.")
    assert [(row.prompt, row.answer) for row in paraphrases(half)] == [("Who?", "It is Orla.")]


def test_data_of_a_run(write_jsonl: Any) -> None:
    encoder = Encoder(byte_tokenizer(), 256)
    more = write_jsonl("more.jsonl", [{"question": "Name?", "answer": "Orla."}])
    data = {"forget": [TOFU], "retain": [Row("qa", "When?", "At nine.")]}
    prepared: Any = find_method("uld").prepare(config(paraphrases=str(more)), encoder, data)
    assert prepared.counts() == {"forget": 1, "paraphrases": 3, "perturbed": 2, "retain": 1, "text": 0}
    assert prepared.keyed
    assert len(prepared.files["paraphrases"]) == 64
    plain: Any = find_method("uld").prepare(config(augment=False), encoder, data)
    assert plain.counts() == {"forget": 1, "paraphrases": 0, "perturbed": 0, "retain": 1, "text": 0}
    assert not plain.keyed


def likely(**values: tuple[float, float]) -> dict[float, Probabilities]:
    return {float(name.strip("s").replace("_", ".")): Probabilities(*pair) for name, pair in values.items()}


def test_strength_is_the_smallest_that_forgets_and_keeps_the_rest() -> None:
    forget = likely(s0=(0.9, 0.9), s1=(0.1, 0.5), s1_5=(0.05, 0.1), s2=(0.01, 0.02), s3=(0.0, 0.0))
    retain = likely(s0=(0.9, 0.9), s1=(0.9, 0.9), s1_5=(0.89, 0.9), s2=(0.885, 0.9), s3=(0.8, 0.9))
    # At 1 the scores have forgotten, generation has not.
    choice = choose_strength(forget, retain, 0.2)
    assert (choice.strength, choice.stronger, choice.shortfall) == (1.5, 2.0, "")
    # Nothing stronger is allowed, because of the retain rows.
    choice = choose_strength(forget, retain, 0.03)
    assert (choice.strength, choice.stronger) == (2.0, 2.0)
    choice = choose_strength(forget, retain, 0.001)
    assert (choice.strength, choice.stronger) == (2.0, 2.0)
    assert "no strength brings forget.prob below 0.001" in choice.shortfall
    lost = {strength: Probabilities(0.5 if strength else 0.9, 0.9) for strength in retain}
    assert "costs the retain rows" in choose_strength(forget, lost, 0.2).shortfall
    assert choose_strength(forget, {}, 0.001).strength == 3.0


def test_student_is_held_against_its_teacher() -> None:
    teacher = {"forget.prob": 0.1, "retain.prob": 0.9}
    assert student_shortfall(teacher, {"forget.prob": 0.24, "retain.prob": 0.89}) == []
    assert len(student_shortfall(teacher, {"forget.prob": 0.26, "retain.prob": 0.87})) == 2


def test_strengths_are_scored_as_the_combination_scores(checkpoints: dict[str, Path]) -> None:
    bench = LossBench(checkpoints["gemma2"])
    pair, head = pair_of(bench)
    rows = encoded(bench)["forget"]
    states = record_states(pair, rows, bench.encoder.pad_id, Silent(), labelled=True)
    table = score_strengths(head, states, rows, (0.0, 1.5))
    for strength in (0.0, 1.5):
        expected = []
        for row in rows:
            ids = torch.tensor([row.ids])
            with torch.inference_mode():
                both = bench.model(input_ids=ids).logits[0], pair.assistant(input_ids=ids).logits[0]
                log_p = combine(*both, {**head.settings, "strength": strength}).log_softmax(-1)
            wanted = torch.tensor(row.ids[row.answer_start :])
            part = log_p[row.answer_start - 1 : -1].gather(1, wanted[:, None])
            expected.append(float(part.mean().exp()))
        assert table[strength].prob == pytest.approx(sum(expected) / len(rows), rel=1e-4)
        assert table[strength].generated >= table[strength].prob
    assert table[1.5].prob != pytest.approx(table[0.0].prob, rel=1e-2)


def pair_of(bench: LossBench, **settings: object) -> tuple[Pair, PairHead]:
    """Target and an assistant that says something of its own."""
    assistant = make_assistant(bench.model, 1, "model.layers")
    with torch.no_grad():
        # A weight of its own: everything else is the target's.
        layer = assistant.get_submodule("model.layers.0.mlp.down_proj")
        layer.weight = torch.nn.Parameter(-layer.weight, requires_grad=False)
    return Pair(bench.model, assistant), PairHead(bench.model, {**PAPER, "floor": 20, **settings})


@pytest.mark.parametrize("train", ["lora", "full"])
def test_student_of_a_full_run_is_taught_by_the_former_head(train: str, checkpoints: dict[str, Path]) -> None:
    from llmsurgery.compute.head import module_head
    from llmsurgery.train.distillation import DistillationLoss

    bench = LossBench(checkpoints["tied_llama"])
    pair, head = pair_of(bench, strength=1.5)
    mixture = Mixture({name: rows for name, rows in encoded(bench).items() if name != "perturbed"}, 0)
    states = {name: record_states(pair, rows, bench.encoder.pad_id, Silent()) for name, rows in mixture.sets.items()}
    expected = []
    for rows in mixture.sets.values():
        for row in rows:
            ids = torch.tensor([row.ids])
            with torch.inference_mode():
                both = bench.model(input_ids=ids).logits[0], pair.assistant(input_ids=ids).logits[0]
                expected.append((combine(*both, head.settings).log_softmax(-1), row))
    settings = config(train=train, roles="linear" if train == "lora" else "all").training
    kept = module_head(head).clone() if train == "full" else module_head(head)
    with bench.trainable(settings) as trainable:
        # The head moves as well in a full run; what the teacher says must not.
        disturb(trainable)
        loss = DistillationLoss(bench.model, mixture, states, kept, bench.encoder.pad_id, None, Session())
        found = float(loss([0, 1]).detach())
        values = []
        for log_p, row in expected:
            with torch.no_grad():
                hidden = final_hidden(
                    bench.model, torch.tensor([row.ids]), torch.ones(1, len(row.ids), dtype=torch.long)
                )
                log_q = read_head(bench.model).logits(hidden[0]).log_softmax(-1)
            values.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    assert found == pytest.approx(sum(values) / len(values), rel=1e-3)


def run(root: Path, data: dict[str, Path], out: Path, settings: dict[str, object], **more: Any) -> dict[str, Any]:
    options = {"until": "none", "guard": "none", **more}
    options["settings"] = {"eval.generate": False, **settings}
    return dict(unlearn(root, method="uld", out=out, **data, **options).manifest)


TOY = {"max_steps": 80, "lr": 3e-3, "assistant_steps": 120, "assistant_lr": 0.01, "assistant_rank": 8}


def test_forget_rows_go_and_retain_rows_stay(memorising: Path, tmp_path: Path) -> None:
    data = {"forget": memorising / "some.jsonl", "retain": memorising / "others.jsonl"}
    manifest = run(memorising / "model", data, tmp_path / "out", TOY)
    record = manifest["operations"][0]["record"]
    table = record["probabilities_by_strength"]
    source = table.pop("0")
    strengths = sorted(table, key=float)
    forget = [table[strength]["forget.prob"] for strength in strengths]
    assert source["forget.prob"] > 0.9
    assert forget == sorted(forget, reverse=True)
    assert all(table[s]["retain.prob"] > 0.98 * source["retain.prob"] for s in strengths if float(s) <= 1.5)
    assert record["student"]["forget.prob"] < 0.3
    assert record["student"]["retain.prob"] > 0.95 * source["retain.prob"]
    assert record["teacher"] == table[f"{record['strength']:g}"]
    metrics = manifest["metrics"]
    assert metrics["forget.prob"]["after"]["value"] == pytest.approx(record["student"]["forget.prob"], abs=1e-3)
    assert metrics["retain.prob"]["after"]["value"] == pytest.approx(record["student"]["retain.prob"], abs=1e-3)
    assert verify(tmp_path / "out", base=memorising / "model")["save"] == "full"


def test_a_full_run_keeps_the_head_of_its_teacher(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmsurgery.train.distillation import DistillationLoss

    seen: list[DistillationLoss] = []
    original = DistillationLoss.__call__
    monkeypatch.setattr(
        DistillationLoss, "__call__", lambda loss, indices: (seen.append(loss), original(loss, indices))[1]
    )
    root = checkpoints["tied_llama"]
    settings = {"max_steps": 3, "lr": 0.01, "train": "full", "roles": "all", "assistant_lr": 0.01}
    run(root, data_files, tmp_path / "out", settings, dtype="float32")
    source = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).get_output_embeddings().weight
    assert torch.equal(seen[-1].head.weight.cpu(), source)
    assert not torch.equal(read_head(seen[-1].model).weight.cpu(), source)


def test_chosen_retain_rows_and_files_are_recorded(
    checkpoints: dict[str, Path], data_files: dict[str, Path], write_jsonl: Any, tmp_path: Path
) -> None:
    text = write_jsonl("plain.jsonl", [{"text": "The miller slept all day long, and the dog slept too."}])
    settings = {"max_steps": 2, "lr": 0.01, "retain_rows": 1, "distill_text": str(text)}
    record = run(checkpoints["gpt2"], data_files, tmp_path / "out", settings)["operations"][0]["record"]
    assert record["rows"] == {"forget": 3, "paraphrases": 0, "perturbed": 0, "retain": 1, "text": 1}
    assert record["retain_chosen"] in ([0], [1])
    assert list(record["files"]) == ["text"]
    assert {"divergence_forget", "divergence_retain", "divergence_text"} <= record.keys()
    assert record["assistant"]["steps"] == 2
    assert "divergence_forget" not in record["assistant"]
    assert "forget_cross_entropy" not in record


def test_trained_metrics_are_named(checkpoints: dict[str, Path], write_jsonl: Any, tmp_path: Path) -> None:
    row = {"question": "Who?", "answer": "Orla.", "paraphrased_answer": "It is Orla.", "perturbed_answer": ["Ivo."]}
    data = {
        "forget": write_jsonl("f.jsonl", [row]),
        "retain": write_jsonl("r.jsonl", [{"question": "A", "answer": "B"}]),
    }
    manifest = run(checkpoints["tied_llama"], data, tmp_path / "out", {"max_steps": 1, "form": "bundle"})
    assert manifest["operations"][0]["record"]["augmented_by_keys"] is True
    assert any("forget.truth_ratio" in notice for notice in manifest["notices"])


def test_guarded_answers_are_not_remembered(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmsurgery.train import assistant

    seen: list[Mixture] = []
    original = assistant.AssistantLoss.__call__

    def watch(loss: AssistantLoss, indices: Any) -> torch.Tensor:
        seen.append(loss.mixture)
        assert loss.session.guard is None
        return original(loss, indices)

    monkeypatch.setattr(assistant.AssistantLoss, "__call__", watch)
    settings = {"max_steps": 1, "form": "bundle", "guard.prompts": 3}
    run(checkpoints["tied_llama"], data_files, tmp_path / "out", settings, guard="self")
    assert len(seen[0].sets["guard"]) == 3


def test_dry_run_counts_the_assistant(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    root, out = checkpoints["tied_llama"], tmp_path / "out"
    sizes = {"rank": 8, "assistant_rank": 4}
    plans = {
        form: run(root, data_files, out, {**sizes, "form": form}, dry_run=True) for form in ("distilled", "bundle")
    }
    structure = LossBench(root).structure
    both = [sum(sum(t.shape) for t in assistant_targets(structure, layers)) for layers in (1, 2)]
    assert plans["bundle"]["trained_parameters"] == 4 * both[0]
    assert plans["distilled"]["trained_parameters"] == 4 * both[0] + 8 * both[1]
    assert plans["bundle"]["tensors"] == plans["bundle"]["bytes_to_rewrite"] == 0


def test_preset_and_stop_rule_of_forms(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="has no --until"):
        run(
            checkpoints["tied_llama"], data_files, tmp_path / "out", {"form": "bundle"}, until="forget.prob<=0.2x"
        )  # fmt: skip
