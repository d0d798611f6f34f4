"""The relearning attack: what is trained on, what is scored, and what a hidden and a removed fact look like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsurgery.data.chat import Encoded
from llmsurgery.data.records import Row, read_rows
from llmsurgery.demo import world_path
from llmsurgery.edits.kinds import LowRank, Replace
from llmsurgery.errors import UsageError
from llmsurgery.evaluate.attacks.relearn import Relearn, RelearnConfig
from llmsurgery.evaluate.robustness.base import AttackConfig, Point, Trial
from llmsurgery.evaluate.robustness.training import cut_row, update_norm
from llmsurgery.evaluate.robustness.verdict import judge_attack

from .benches import FORGET, bench_of

TINY = RelearnConfig(score="token_prob", sizes=(1, 0), epochs=2, rank=2, folds=2)


def labels(trial: Trial) -> list[str]:
    return [point.label for point in trial.points]


def test_every_row_is_tested_by_a_model_that_did_not_train_on_it(checkpoints: dict[str, Path]) -> None:
    trial = Relearn().run(TINY, bench_of(checkpoints["tied_llama"]), None)
    assert labels(trial) == [
        f"lora {mode} {size} epoch {epoch}"
        for mode, sizes in (("subset", (1, 2)), ("benign", (1, 2)))
        for size in sizes
        for epoch in (1, 2)
    ]
    for point in trial.points:
        assert point.scores.keys() == trial.before.keys()
        assert point.utility is not None
        assert point.counts
    last = trial.points[3].detail
    assert last["update_norm"] > 0  # type: ignore[operator]
    # It trains on more than it tests: what it trained on is better known than before.
    assert last["learned"] > np.mean(list(trial.before.values()))  # type: ignore[operator]
    assert trial.budget == {
        "recipes": ["lora subset 1", "lora subset 2", "lora benign 1", "lora benign 2"],
        "steps": 4,
        "folds": 2,
        "seeds": 1,
    }


def test_control_rows_are_scored_at_every_point_and_not_trained_on(checkpoints: dict[str, Path]) -> None:
    config = replace(TINY, modes=("subset",), sizes=(0,))
    control = [Row("qa", "Who mends the nets?", "Pell Orrin."), Row("qa", "What is in the barn?", "A cart.")]
    bench, plain = (bench_of(checkpoints["tied_llama"], rows) for rows in ({"control": control}, {}))
    source = Relearn().run(config, bench, None)
    assert source.control.keys() == {"0", "1"}
    assert not any(point.control for point in source.points), "the source is scored on them once"
    edited, without = (Relearn().run(config, one, source) for one in (bench, plain))
    assert edited.control == source.control
    for point, same in zip(edited.points, without.points, strict=True):
        # The runs are those of an attack without control rows.
        assert point.scores == same.scores
        assert point.control.keys() == {"0", "1"}
        assert point.control != edited.control
        assert not same.control
    assert judge_attack(edited, source, None, 0.0, {}).record["control_rows"]["n"] == 0  # type: ignore[index]


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe"])
def test_other_recipes(family: str, checkpoints: dict[str, Path]) -> None:
    config = replace(TINY, trainers=("rtt", "steps", "epoch"), modes=("syntax",), sizes=(0,), rtt_epochs=2)
    named = [Row("qa", f"What does {name} do?", f"{name} bakes.") for name in ("Orla", "Tam", "Ivo", "Pell")]
    bench = bench_of(checkpoints[family], {"forget": named})
    trial = Relearn().run(replace(config, rtt_lr=(1e-4, 1e-3)), bench, None)
    assert labels(trial) == [
        *(f"rtt syntax 2 lr {lr} epoch {epoch}" for lr in ("0.0001", "0.001") for epoch in (1, 2)),
        *(f"steps syntax 2 step {step}" for step in (15, 30, 48, 60)),
        "epoch epoch 1",
    ]
    assert [point.counts for point in trial.points] == [True] * 8 + [False]
    norms = [point.detail["update_norm"] for point in trial.points if "update_norm" in point.detail]
    assert norms[1] > 2 * norms[0] > 0  # type: ignore[operator]
    # The model on the bench is the stored one again.
    assert bench.score("token_prob") == trial.before


def test_without_retain_rows_it_trains_on_plain_text(checkpoints: dict[str, Path]) -> None:
    bench = bench_of(checkpoints["tied_llama"])
    del bench.data.encoded["retain"], bench.data.rows["retain"]
    trial = Relearn().run(replace(TINY, modes=("benign",), sizes=(10,)), bench, None)
    assert labels(trial) == ["lora benign 1 epoch 1", "lora benign 1 epoch 2"]
    assert trial.utility is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trainers": ("lorra",)}, "lora"),
        ({"modes": ("subsets",)}, "subset"),
        ({"sizes": ()}, "nothing to do"),
        ({"sizes": (-1,)}, "nothing to do"),
        ({"trainers": ("rtt",), "rtt_lr": (0.0,)}, "rtt_lr"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Relearn().check(replace(RelearnConfig(), **settings), {"forget": FORGET})


def test_rows_are_checked() -> None:
    with pytest.raises(UsageError, match="one item"):
        Relearn().check(RelearnConfig(), {"forget": FORGET[:1]})
    Relearn().check(RelearnConfig(modes=("benign",)), {"forget": FORGET[:1]})
    with pytest.raises(UsageError, match="a name or a number"):
        Relearn().check(RelearnConfig(modes=("syntax",)), {"forget": [Row("qa", "Where?", "Here."), FORGET[1]]})


def test_update_norm_is_that_of_the_dense_change() -> None:
    generator = np.random.default_rng(0)
    stored = {"a": generator.normal(size=(6, 5)), "b": generator.normal(size=(3, 4))}
    u, v, new = generator.normal(size=(6, 2)), generator.normal(size=(2, 5)), generator.normal(size=(3, 4))
    found = update_norm([LowRank("a", u, v), Replace("b", new)], lambda name: stored[name])
    change = np.linalg.norm(u @ v) ** 2 + np.linalg.norm(new - stored["b"]) ** 2
    whole = np.linalg.norm(stored["a"]) ** 2 + np.linalg.norm(stored["b"]) ** 2
    assert found == pytest.approx(float(np.sqrt(change / whole)))


def test_long_rows_are_cut() -> None:
    row = Encoded((1, 2, 3, 4, 5), 3, True)
    assert cut_row(row, 9, False) == row
    assert cut_row(row, 4, False) == Encoded((1, 2, 3, 4), 3, False)
    assert cut_row(row, 3, False) == Encoded((1, 2, 3), 2, False)
    assert cut_row(row, 9, True) == Encoded(row.ids, 1, True)


def test_curves_and_ratio() -> None:
    def trial(*values: float, epoch: float) -> Trial:
        points = [
            Point(f"c epoch {i}", {"0": value}, detail={"curve": "c", "epoch": i}) for i, value in enumerate(values)
        ]
        return Trial({"0": 0.1}, [*points, Point("epoch epoch 1", {"0": epoch}, detail={"curve": "epoch", "epoch": 1})])

    edited, control = trial(0.3, 0.5, 0.9, epoch=0.5), trial(0.1, epoch=0.2)
    found = Relearn().compare(edited, Trial({"0": 0.9}, []), control)
    assert found["half_the_gap"] == {"c": {"epoch": 1}, "epoch": {"epoch": 1}}
    assert found["relearn_ratio"] == pytest.approx(0.25)
    assert "relearn_ratio" not in Relearn().compare(edited, Trial({"0": 0.9}, []), None)


def demo_rows() -> dict[str, list[Row]]:
    return {name: read_rows(world_path(f"{name}.jsonl")) for name in ("forget", "retain", "text")}


def test_hidden_facts_come_back_and_facts_never_known_do_not(hidden_demo: Path) -> None:
    attack, config = Relearn(), RelearnConfig(modes=("subset",), sizes=(10,), epochs=2, on_source=False)
    shared = AttackConfig(retain_rows=8)
    model, control = (bench_of(world_path(name), demo_rows(), config=shared) for name in ("model", "control"))
    source, aside = attack.run(config, model, None), attack.run(config, control, Trial({}, ()))
    hidden = bench_of(hidden_demo, demo_rows(), config=shared)
    found = judge_attack(attack.run(config, hidden, source), source, aside, 0.5, {})
    assert found.record["before"] < 0.4  # type: ignore[operator]
    assert found.verdict == "HIDDEN"
    assert found.record["excess"] > 0.3  # type: ignore[operator]
    # Facts that were never there do not follow from other facts.
    removed = judge_attack(aside, source, aside, 0.5, {})
    assert removed.record["recovery"] < 0.15  # type: ignore[operator]
    assert removed.verdict == "ROBUST"
    # A step size that moves nothing proves nothing.
    feeble = attack.run(replace(config, lr=1e-7, sizes=(1,)), hidden, source)
    found = judge_attack(feeble, source, None, 0.5, {})
    assert found.verdict == "INCONCLUSIVE"
    assert "not relearned" in found.reason
