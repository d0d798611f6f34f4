"""The lens: layers read as the last one, a layer chosen on other rows, and facts that lie below the surface."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmsurgery.data.records import Row, read_rows
from llmsurgery.demo import world_path
from llmsurgery.errors import UsageError
from llmsurgery.evaluate.attacks.lens import Lens, LensConfig
from llmsurgery.evaluate.robustness.base import Point, Trial
from llmsurgery.evaluate.robustness.tokens import answer_tokens, choose_layer
from llmsurgery.evaluate.robustness.verdict import judge_attack

from .benches import bench_of


@pytest.mark.parametrize("family", ["tied_llama", "gpt2", "gemma", "gemma2", "gpt_neox", "olmo2", "mixtral"])
def test_the_last_layer_is_the_models_own_answer(family: str, checkpoints: dict[str, Path]) -> None:
    bench = bench_of(checkpoints[family])
    trial = Lens().run(LensConfig(sites=("block", "attention", "mlp", "middle")), bench, None)
    points = {point.label: point for point in trial.points}
    assert points["block 2"].scores == trial.before
    rows: dict[str, list[float]] = {}
    for key, hit in trial.before.items():
        rows.setdefault(key.partition(":")[0], []).append(hit)
    accuracy = bench.score("accuracy")
    assert {row: sum(hits) / len(hits) for row, hits in rows.items()} == pytest.approx(accuracy)
    assert {"attention 0", "attention 1", "mlp 0", "mlp 1"} <= points.keys()
    assert ("middle 0" in points) == (family not in {"gpt_neox", "olmo2"})
    notices = bench.progress.notices  # type: ignore[attr-defined]
    assert bool(notices) == (family in {"gpt_neox", "olmo2"})
    assert [point.counts for point in trial.points] == [True] + [False] * (len(points) - 1)
    for point in trial.points[1:]:
        assert 0 <= point.detail["probability"] <= point.detail["top10"] + 0.1 <= 1.1  # type: ignore[operator]


def test_answer_tokens_leave_out_prompt_and_end(checkpoints: dict[str, Path]) -> None:
    bench = bench_of(checkpoints["tied_llama"])
    tokens = answer_tokens(bench.forget)
    text = bench.encoder.tokenizer.decode([token.label for token in tokens if token.row == 1])
    assert text == "By the weir."
    first = answer_tokens(bench.forget, first_alone=True)
    assert [token.row for token in first] == [0, 1, 2, 3]
    assert first == [next(token for token in tokens if token.row == row) for row in range(4)]


def test_the_layer_for_one_half_is_chosen_on_the_other() -> None:
    keys = [f"{row}:5" for row in range(10)]
    source = Trial(dict.fromkeys(keys, 1.0), ())
    # Each layer is right on some rows alone; no layer is better than another on rows that had no say in its choice.
    layers = [Point(str(i), {key: float(int(key[0]) % 5 == i) for key in keys}) for i in range(5)]
    found = choose_layer("chosen", layers, 10, source, seed=0)
    assert found.scores.keys() == set(keys)
    best = max(sum(point.scores.values()) for point in layers)
    assert sum(found.scores.values()) <= best
    good = Point("good", dict.fromkeys(keys, 1.0))
    chosen = choose_layer("chosen", [*layers, good], 10, source, seed=0)
    assert chosen.scores == good.scores
    assert chosen.detail == {"layers": ["good", "good"]}


def test_another_tokenizer_is_refused(checkpoints: dict[str, Path]) -> None:
    source = Lens().run(LensConfig(), bench_of(checkpoints["tied_llama"]), None)
    other = bench_of(checkpoints["tied_llama"], {"forget": [Row("qa", "Who keeps the hens?", "Orla Venn.")]})
    with pytest.raises(UsageError, match="tokenizers"):
        Lens().run(LensConfig(), other, source)


def test_settings_are_checked() -> None:
    for sites in ((), ("blocks",)):
        with pytest.raises(UsageError):
            Lens().check(LensConfig(sites=sites), {})


def test_hidden_facts_show_below_and_unknown_ones_do_not(hidden_demo: Path) -> None:
    rows = {name: read_rows(world_path(f"{name}.jsonl")) for name in ("forget", "retain", "text")}
    places = (world_path("model"), world_path("control"), hidden_demo)
    trials: list[Trial] = []
    for place in places:
        trials.append(Lens().run(LensConfig(), bench_of(place, rows), trials[0] if trials else None))
    source, control, edited = trials
    found = judge_attack(edited, source, control, 0.5, {}, only_told=True).record
    points = {point["label"]: point for point in found["points"]}  # type: ignore[attr-defined]
    assert found["control"]["before"] == 0.0  # type: ignore[index]
    assert found["control"]["after"] < 0.1  # type: ignore[index]
    assert found["excess"] > 0.1  # type: ignore[operator]
    assert points["block 5"]["source_after"] == 1.0
    assert points["block 0"]["source_after"] < 0.1
