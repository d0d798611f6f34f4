"""Values in JSON side files: what is set, what stays as it was, and what is refused."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from llmsurgery.checkpoint import Checkpoint
from llmsurgery.checkpoint.json_text import dump_like
from llmsurgery.edits.config import beside_files
from llmsurgery.edits.kinds import REMOVED, Config, Drop, Edit, File
from llmsurgery.errors import DamagedError, InputError, SurgeryError

from ..checkpoint.builders import single

TEXT = """{
  "zeta": 1e-05,
  "model_type": "llama",
  "alpha": {
    "factor": 2,
    "kinds": [
      1,
      2
    ]
  },
  "name": "\u00fcber"
}
"""


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    root = single(tmp_path / "base")
    (root / "config.json").write_text(TEXT)
    return Checkpoint.open(root)


def config(base: Checkpoint, *edits: Edit) -> str:
    (file,) = beside_files(base, edits)
    assert file.path == "config.json"
    return file.content.decode()


def at(*keys: str) -> tuple[str, ...]:
    return ("config.json", *keys)


def test_all_else_stays_as_it_is_written(base: Checkpoint) -> None:
    assert config(base, Config(at("model_type"), "other")) == TEXT.replace('"llama"', '"other"')
    assert config(base, Config(at("alpha", "factor"), 3)) == TEXT.replace('"factor": 2', '"factor": 3')
    assert config(base, Config(at("alpha", "kinds"), (1,))) == TEXT.replace("1,\n      2\n", "1\n")
    assert config(base, Config(at("zeta"), REMOVED)) == TEXT.replace('  "zeta": 1e-05,\n', "")
    new = config(base, Config(at("added"), None), Config(at("deep", "er"), {"a": [True, 1.5]}))
    assert list(json.loads(new)) == ["zeta", "model_type", "alpha", "name", "added", "deep"]
    assert json.loads(new)["deep"] == {"er": {"a": [True, 1.5]}}
    assert new.startswith(TEXT[:-3])


def test_the_manner_of_writing_is_kept() -> None:
    value = {"b": [1, {"a": "\u00e9"}], "a": None}
    manners = product((None, 2, 4, "\t"), (True, False), ("", "\n"))
    texts = [json.dumps(value, indent=indent, ensure_ascii=ascii_only) + end for indent, ascii_only, end in manners]
    for text in texts:
        assert dump_like(text.encode(), value) == text.encode()
    assert dump_like(b'{"b":1,  "a":2}', {"b": 1}) == b'{\n  "b": 1\n}'


def test_edits_apply_in_order_and_count_once(base: Checkpoint) -> None:
    edits: list[Edit] = [Config(at("zeta"), 5), Drop("a.f16"), Config(at("zeta"), 6), File("x/y.txt", b"z")]
    first, second = beside_files(base, edits)
    assert json.loads(first.content)["zeta"] == 6
    assert second == File("x/y.txt", b"z")
    # What ends where it began is no change.
    assert beside_files(base, [Config(at("zeta"), 5), Config(at("zeta"), 1e-05)]) == []
    assert beside_files(base, [Config(at("nothing"), REMOVED), Config(at("a", "b"), REMOVED)]) == []
    assert beside_files(base, [Config(at("alpha", "factor"), 2), File("config.json", TEXT.encode())]) == []
    # 1 and true are equal to Python and not to a reader of the file.
    assert '"factor": true' in config(base, Config(at("alpha", "factor"), 2), Config(at("alpha", "factor"), True))
    (replaced,) = beside_files(base, [File("config.json", b'{"a": 1}'), Config(at("b"), 2)])
    assert replaced.content == b'{"a": 1, "b": 2}'


def test_generation_config_may_be_new(base: Checkpoint) -> None:
    (file,) = beside_files(base, [Config(("generation_config.json", "temperature"), 0.5)])
    assert file == File("generation_config.json", b'{\n  "temperature": 0.5\n}\n')
    with pytest.raises(InputError, match="does not exist"):
        beside_files(base, [Config(("processor_config.json", "a"), 1)])


@pytest.mark.parametrize(
    "path", [at("zeta", "a"), at("name", "a"), at("alpha", "kinds", "a"), at("alpha", "factor", "b")]
)
def test_a_path_through_a_value_without_keys_is_refused(path: tuple[str, ...], base: Checkpoint) -> None:
    for value in (1, REMOVED):
        with pytest.raises(InputError, match=r"cannot be set in config\.json") as caught:
            beside_files(base, [Config(path, value)])
        assert caught.value.exit_code == 3


def test_what_is_no_setting_is_a_bug_of_the_method(base: Checkpoint) -> None:
    paths = [("config.json",), (), ("surgery.json", "a"), ("model.safetensors.index.json", "metadata"), ("a.txt", "b")]
    for path in paths:
        with pytest.raises(SurgeryError) as caught:
            beside_files(base, [Config(path, 1)])
        assert caught.value.exit_code == 1
    for value in (object(), {1, 2}):
        with pytest.raises(SurgeryError, match="not JSON"):
            beside_files(base, [Config(at("a"), value)])  # type: ignore[arg-type]
    with pytest.raises(DamagedError):
        beside_files(base, [Config(("../config.json", "a"), 1)])


def test_a_damaged_file_is_refused(base: Checkpoint) -> None:
    (base.root / "generation_config.json").write_text("{")
    with pytest.raises(DamagedError, match="cannot be parsed") as caught:
        beside_files(base, [Config(("generation_config.json", "a"), 1)])
    assert caught.value.exit_code == 8
