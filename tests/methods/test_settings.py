"""Hyperparameters: conversion, bounds, presets, assignments and YAML files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llmsurgery.errors import InputError, UsageError
from llmsurgery.methods.settings import (
    as_record,
    parse_assignments,
    read_config_file,
    resolve_config,
    settings_of,
)
from llmsurgery.train.config import TrainingConfig, option


@dataclass(frozen=True)
class Example:
    """A method's config with a nested group."""

    strength: float = option(0.5, "how much", minimum=0, maximum=1)
    mode: str = option("soft", "how", ("soft", "hard"))
    keep: bool = option(False, "whether")
    names: tuple[str, ...] = option(("a",), "which")
    seed_rows: int | None = option(None, "how many", minimum=1)
    scorer: str | None = option(None, "which score", ("exact", "rouge_l"))
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(rank=4))


PRESETS: dict[str, dict[str, object]] = {"paper": {"strength": 1.0, "rank": 16, "lr": 1e-5, "roles": ("all",)}}


def resolve(**settings: object) -> Example:
    resolved: Example = resolve_config(Example, settings, PRESETS)
    return resolved


def value(name: str, given: object) -> object:
    return as_record(resolve(**{name: given}))[name]


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("lr", "1e-4", 1e-4),
        ("lr", ".5", 0.5),
        ("lr", "3", 3.0),
        ("lr", 2, 2.0),
        ("lr", "none", None),
        ("lr", "None", None),
        ("lr", None, None),
        ("seed_rows", "7", 7),
        ("seed_rows", "none", None),
        ("scorer", None, None),
        ("scorer", "none", None),
        ("scorer", "exact", "exact"),
        ("rank", "32", 32),
        ("warmup_steps", "-1", -1),
        ("keep", "true", True),
        ("keep", "False", False),
        ("keep", "1", True),
        ("keep", "no", False),
        ("keep", True, True),
        ("layers", "1,2, 3", [1, 2, 3]),
        ("layers", "[4, 5]", [4, 5]),
        ("layers", "(6,)", [6]),
        ("layers", "", []),
        ("layers", [1, 2], [1, 2]),
        ("roles", "mlp.down", ["mlp.down"]),
        ("roles", "mlp.down,attn.o", ["mlp.down", "attn.o"]),
        ("names", ("x", "y"), ["x", "y"]),
        ("mode", "hard", "hard"),
        ("schedule", "cosine", "cosine"),
    ],
)
def test_values_are_converted_to_the_type_of_the_setting(name: str, given: object, expected: object) -> None:
    found = value(name, given)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("rank", "many"),
        ("rank", "1.5"),
        ("rank", "none"),
        ("rank", None),
        ("rank", ""),
        ("lr", "fast"),
        ("keep", "maybe"),
        ("layers", "1,two"),
        ("layers", {"a": 1}),
        ("names", 5),
        ("mode", 3),
    ],
)
def test_value_of_the_wrong_type_names_setting_and_value(name: str, given: object) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        resolve(**{name: given})
    assert caught.value.exit_code == 2
    assert str(given) in caught.value.what


@pytest.mark.parametrize(
    ("name", "given", "bound"),
    [
        ("strength", "1.01", "at least 0 and at most 1"),
        ("strength", "-0.01", "at least 0 and at most 1"),
        ("rank", "0", "at least 1"),
        ("seed_rows", 0, "at least 1"),
        ("warmup_steps", "-2", "at least -1"),
        ("dropout", 1.5, "at most 1"),
    ],
)
def test_value_out_of_bounds_names_them(name: str, given: object, bound: str) -> None:
    with pytest.raises(UsageError, match="out of bounds") as caught:
        resolve(**{name: given})
    assert bound in caught.value.why


@pytest.mark.parametrize("given", ["nan", "inf", "-inf"])
def test_numbers_must_be_finite(given: str) -> None:
    with pytest.raises(UsageError, match="finite"):
        resolve(strength=given)


def test_bounds_themselves_are_allowed() -> None:
    assert [value("strength", "0"), value("strength", "1"), value("rank", "1")] == [0.0, 1.0, 1]


def test_unknown_choice_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown value of schedule 'linaer'") as caught:
        resolve(schedule="linaer")
    assert "linear" in caught.value.why


@pytest.mark.parametrize(("name", "near"), [("strenght", "strength"), ("batchsize", "batch_size"), ("rnk", "rank")])
def test_unknown_name_comes_with_the_three_nearest(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"unknown hyperparameter '{name}'") as caught:
        resolve(**{name: "1"})
    assert caught.value.exit_code == 2
    names = caught.value.why.removeprefix("nearest: ").split(", ")
    assert names[0] == near
    assert len(names) == 3


def test_nested_groups_appear_under_their_own_names() -> None:
    known = settings_of(Example)
    # The nested default of this config, not that of the group's class.
    assert known["rank"].default == 4
    assert known["rank"].group == "training"
    assert known["strength"].group == ""
    assert known["mode"].choices == ("soft", "hard")
    assert "training" not in known
    with pytest.raises(UsageError):
        resolve(training="x")


def test_defaults_presets_and_overrides_in_this_order() -> None:
    assert resolve() == Example()
    assert resolve(preset="toolkit") == resolve(preset=None) == Example()
    paper = resolve(preset="paper")
    assert (paper.strength, paper.training.rank, paper.training.lr) == (1.0, 16, 1e-5)
    assert paper.training.roles == ("all",)
    # What the preset does not name keeps its default; the order of the overrides does not matter.
    assert (paper.mode, paper.training.batch_size) == ("soft", 4)
    for own in (resolve(rank="2", preset="paper"), resolve(preset="paper", rank="2")):
        assert (own.strength, own.training.rank) == (1.0, 2)
    with pytest.raises(UsageError, match="unknown preset 'papre'") as caught:
        resolve(preset="papre")
    assert "paper" in caught.value.why
    with pytest.raises(UsageError):
        resolve_config(Example, {"preset": "paper"})


def test_record_is_flat_json_with_every_setting() -> None:
    record = as_record(resolve(layers="1,2"))
    assert set(record) == set(settings_of(Example))
    assert record["layers"] == [1, 2]
    assert json.loads(json.dumps(record)) == record
    # A record resolves to the config that it came from.
    assert resolve(**record) == resolve(layers="1,2")


def test_assignments() -> None:
    assert parse_assignments(["lr=1e-4", " templates = a=b.txt ", "lr=2e-4", "roles="]) == {
        "lr": "2e-4", "templates": "a=b.txt", "roles": "",
    }  # fmt: skip
    for text in ("lr", "=1", " =1", ""):
        with pytest.raises(UsageError, match="not an assignment") as caught:
            parse_assignments([text])
        assert caught.value.exit_code == 2


def test_config_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    # YAML 1.1 reads 1e-4 as a string; the type of the setting makes it a number.
    path.write_text("lr: 1e-4\nrank: 2\nlayers: [0, 1]\nroles: mlp.down\nkeep: yes\nseed_rows: null\n")
    found = resolve(**read_config_file(path))
    assert (found.training.lr, found.training.rank, found.training.layers) == (1e-4, 2, (0, 1))
    assert (found.training.roles, found.keep, found.seed_rows) == (("mlp.down",), True, None)


@pytest.mark.parametrize("content", ["", "- lr\n- rank\n", "just text", "1: 2\n", "lr: [1, 2\n", "a: b: c\n", "\tx: 1"])
def test_unusable_config_file_is_an_input_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_config_file(path)
    assert caught.value.exit_code == 3
    assert str(path) in caught.value.what


def test_config_file_must_exist_and_be_utf8(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_config_file(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("mode: größe".encode("latin-1"))
    with pytest.raises(InputError, match="not YAML"):
        read_config_file(tmp_path / "latin.yaml")
