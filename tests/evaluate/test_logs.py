"""Logs of both published layouts: the same figures from objects and lists, and from our own log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsurgery.api import evaluate_logs
from llmsurgery.errors import InputError, SurgeryError, UsageError
from llmsurgery.evaluate.formulas import harmonic_mean, log_truth_ratio, membership_auc, normalised_probability

NAMES = {"forget": "forget", "retain": "retain", "authors": "ra", "facts": "wf"}
FILES = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "authors": "eval_real_author_wo_options.json",
    "facts": "eval_real_world_wo_options.json",
}
Raw = dict[str, dict[str, Any]]


def draw(seed: int, rows: int = 12) -> Raw:
    """Losses and recalls of a made-up model on all four sets."""
    numbers = np.random.default_rng(seed)
    return {
        name: {
            "loss": numbers.uniform(0.01, 3, rows).tolist(),
            "correct": numbers.uniform(0.01, 3, rows).tolist(),
            "wrong": numbers.uniform(0.5, 4, (rows, 3)).tolist(),
            "rouge": numbers.uniform(0.1, 1, rows).tolist(),
        }
        for name in NAMES
    }


def keyed(values: list[Any], as_list: bool) -> Any:
    return values if as_list else {str(index): value for index, value in enumerate(values)}


def tofu_log(raw: Raw, as_list: bool) -> dict[str, Any]:
    return {
        file: {
            "avg_gt_loss": keyed(raw[name]["loss"], as_list),
            "gt_loss": keyed([9.9] * len(raw[name]["loss"]), as_list),
            "avg_paraphrased_loss": keyed(raw[name]["correct" if name in ("forget", "retain") else "loss"], as_list),
            "average_perturb_loss": keyed(raw[name]["wrong"], as_list),
            "rougeL_recall": keyed(raw[name]["rouge"], as_list),
            "generated_text": {"0": ["a question", "an answer", "a truth"]},
        }
        for name, file in FILES.items()
    }


def open_log(raw: Raw, as_list: bool, losses: bool = True) -> dict[str, Any]:
    """Layout of open-unlearning; without losses of single answers, as its slimmer releases write it."""
    log: dict[str, Any] = {}
    for name, prefix in NAMES.items():
        found = raw[name]
        correct = found["correct"] if name in ("forget", "retain") else found["loss"]
        ratios = [math.exp(log_truth_ratio(c, w, "geometric")) for c, w in zip(correct, found["wrong"], strict=True)]
        shares = [normalised_probability(a, w) for a, w in zip(found["loss"], found["wrong"], strict=True)]
        columns = {
            f"{prefix}_Q_A_Prob": [{"prob": math.exp(-one), "avg_loss": one} for one in found["loss"]],
            f"{prefix}_Q_A_ROUGE": [{"rougeL_recall": one, "generation": "text"} for one in found["rouge"]],
            "forget_truth_ratio" if name == "forget" else f"{prefix}_Truth_Ratio": [{"score": one} for one in ratios],
            f"{prefix}_Q_A_Prob_normalised": [{"prob": one} for one in shares],
        }
        if losses:
            columns[f"{prefix}_Q_A_PERT_Prob"] = [{"avg_loss": many} for many in found["wrong"]]
            if name in ("forget", "retain"):
                columns[f"{prefix}_Q_A_PARA_Prob"] = [{"avg_loss": one} for one in correct]
        log |= {key: {"agg_value": -1, "value_by_index": keyed(rows, as_list)} for key, rows in columns.items()}
    log["exact_memorization"] = {"value_by_index": {"0": {"score": 0.5}, "1": {"score": None}, "2": {"score": 1.0}}}
    log["extraction_strength"] = {"agg_value": 0.2, "value_by_index": {"0": {"score": 0.2}}}
    sides = {"forget": raw["forget"]["loss"], "holdout": raw["retain"]["loss"]}
    log["mia_min_k"] = {
        "agg_value": -1,
        **{side: {"value_by_index": keyed([{"score": one} for one in rows], as_list)} for side, rows in sides.items()},
    }
    return log


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def values(document: dict[str, Any]) -> dict[str, Any]:
    return {name: figure["value"] for name, figure in document["models"][0]["metrics"].items()}


def expected(raw: Raw, mean: str) -> dict[str, float]:
    """The nine figures and their harmonic mean, straight from the definitions."""
    nine = []
    for name in ("retain", "authors", "facts"):
        found = raw[name]
        loss, wrong = np.array(found["loss"]), np.array(found["wrong"])
        correct = np.array(found["correct"]) if name == "retain" else loss
        w = np.exp(-wrong.mean(1)) if mean == "geometric" else np.exp(-wrong).mean(1)
        right = np.exp(-loss)
        nine.append((right if name == "retain" else right / (right + np.exp(-wrong).sum(1))).mean())
        nine.append(np.mean(found["rouge"]))
        nine.append(np.maximum(0, 1 - w / np.exp(-correct)).mean())
    wrong = np.array(raw["forget"]["wrong"])
    w = np.exp(-wrong.mean(1)) if mean == "geometric" else np.exp(-wrong).mean(1)
    ratio = w / np.exp(-np.array(raw["forget"]["correct"]))
    return {
        "utility.model_utility": harmonic_mean(nine),
        "forget.truth_ratio": float(np.minimum(ratio, 1 / ratio).mean()),
        "forget.prob": float(np.exp(-np.array(raw["forget"]["loss"])).mean()),
        "retain.rouge_l": float(np.mean(raw["retain"]["rouge"])),
    }


@pytest.mark.parametrize("protocol", ["own", "tofu"])
@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("layout", ["open", "tofu"])
def test_aggregates_are_recomputed(layout: str, as_list: bool, protocol: str, tmp_path: Path) -> None:
    raw, other = draw(1), draw(2)
    make = open_log if layout == "open" else tofu_log
    path = write(tmp_path / "log.json", make(raw, as_list))
    # The retain log may be of the other tool.
    retain = write(tmp_path / "retain.json", (tofu_log if layout == "open" else open_log)(other, not as_list))
    document = evaluate_logs([path], retain_log=retain, settings={"protocol": protocol})
    found = values(document)
    for name, value in expected(raw, "arithmetic" if protocol == "tofu" else "geometric").items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    quality = document["models"][0]["metrics"]["forget.quality"]  # type: ignore[index]
    assert 0 < quality["value"] <= 1
    assert quality["detail"]["log10_p"] == pytest.approx(math.log10(quality["value"]))
    itself = evaluate_logs([path], retain_log=path)
    assert values(itself)["forget.quality"] == 1.0
    assert "text" not in json.dumps(document["models"])


def test_memorisation_and_membership_of_open_unlearning(tmp_path: Path) -> None:
    raw = draw(3)
    found = values(evaluate_logs([write(tmp_path / "log.json", open_log(raw, False))]))
    # Rows that have no score are left out.
    assert found["forget.accuracy"] == pytest.approx(0.75)
    assert found["forget.extraction_strength"] == pytest.approx(0.2)
    assert found["forget.min_k_auc"] == pytest.approx(membership_auc(raw["forget"]["loss"], raw["retain"]["loss"]))
    # Without a retain model the comparison is unknown, not 0.
    assert found["forget.quality"] is None


def test_log_with_scores_alone(tmp_path: Path) -> None:
    raw = draw(4)
    path = write(tmp_path / "log.json", open_log(raw, False, losses=False))
    retain = write(tmp_path / "retain.json", tofu_log(draw(5), False))
    full = write(tmp_path / "full.json", open_log(raw, True))
    slim, rich = (values(evaluate_logs([one], retain_log=retain)) for one in (path, full))
    assert slim == pytest.approx(rich, abs=1e-6)
    with pytest.raises(InputError, match="no losses of single wrong answers"):
        evaluate_logs([path], settings={"protocol": "tofu"})


def test_own_log_gives_the_same_figures_again(tmp_path: Path) -> None:
    raw, retain = draw(6), write(tmp_path / "retain.json", tofu_log(draw(7), False))
    first = evaluate_logs(
        [write(tmp_path / "log.json", open_log(raw, True))], retain_log=retain, log=tmp_path / "own.json"
    )
    again = evaluate_logs([tmp_path / "own.json"], retain_log=retain)
    assert values(again) == pytest.approx(values(first), abs=1e-9)
    assert again["models"][0]["layout"] == "open-unlearning"  # type: ignore[index]
    content = json.loads((tmp_path / "own.json").read_text())
    # What the two tools look up in the log of a retain model.
    assert content["forget_truth_ratio"]["value_by_index"]["0"]["score"] > 0
    assert len(content["eval_log_forget.json"]["average_perturb_loss"]["0"]) == 3
    assert content["forget_Q_A_Prob"]["agg_value"] == pytest.approx(values(first)["forget.prob"])
    with pytest.raises(UsageError, match="exists"):
        evaluate_logs([tmp_path / "own.json"], log=tmp_path / "own.json")
    with pytest.raises(UsageError, match="one model"):
        evaluate_logs([retain, retain], log=tmp_path / "two.json")


def test_first_rows_under_the_protocol_of_tofu(tmp_path: Path) -> None:
    raw = draw(8, rows=310)
    log = write(tmp_path / "log.json", tofu_log(raw, False))
    metrics: Any = evaluate_logs([log], settings={"protocol": "tofu"})["models"]
    assert metrics[0]["metrics"]["forget.prob"]["n"] == 300
    assert metrics[0]["metrics"]["utility.model_utility"]["n"] == 300 + 310 + 310
    metrics = evaluate_logs([log], settings={"protocol": "tofu", "rows": 40})["models"]
    assert metrics[0]["metrics"]["retain.prob"]["n"] == 40


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not an object"),
        ("{}", "no numbers per row"),
        ('{"some": {"agg_value": 1}}', "found some"),
        ('{"forget_Q_A_Prob": {"value_by_index": {"0": {"avg_loss": "x"}}}}', "row 0 is not a number"),
        ('{"forget_Q_A_Prob": {"value_by_index": "x"}}', "holds no rows"),
        ('{"eval_log.json": {"avg_gt_loss": {"0": [1]}}}', "row 0 is not a number"),
        ('{"forget_Q_A_Prob": {"value_by_index": {"0": {"avg_loss": NaN}}}}', "row 0 is not a number"),
    ],
)
def test_unusable_logs(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(content)
    with pytest.raises(SurgeryError) as caught:
        evaluate_logs([path])
    assert caught.value.exit_code == 3
    assert str(path) in caught.value.what
    assert said in str(caught.value)


def test_missing_log_and_retain_log_without_ratios(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        evaluate_logs([tmp_path / "none.json"])
    good = write(tmp_path / "good.json", tofu_log(draw(1), False))
    bare = write(tmp_path / "bare.json", {"forget_Q_A_Prob": {"value_by_index": {"0": {"avg_loss": 1.0}}}})
    with pytest.raises(InputError, match="no truth ratios"):
        evaluate_logs([good], retain_log=bare)
