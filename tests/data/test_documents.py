"""YAML and JSON of unknown origin: what is read, and what is refused at once."""

from __future__ import annotations

import pytest

from llmsurgery.data.documents import MAX_YAML, parse_json, parse_yaml


def test_aliases_and_merged_keys_are_read() -> None:
    text = "first: &a {lr: 0.1, rank: 4}\nsecond: {<<: *a, lr: 0.2}\nthird: *a\n"
    assert parse_yaml(text) == {
        "first": {"lr": 0.1, "rank": 4},
        "second": {"lr": 0.2, "rank": 4},
        "third": {"lr": 0.1, "rank": 4},
    }
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)), "aliases"),
        ("a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1}, ' * 9}]}}\n" for n in range(1, 9)), "aliases"),
        ("&a [*a]", "part of"),
        ("a: &a {b: {c: *a}}", "part of"),
        ("[" * 60 + "]" * 60, "deeply"),
        ("[" * 20_000, "deeply"),
        ("x: 1\n" * (MAX_YAML // 5 + 1), "characters"),
        ("a\0", "unacceptable"),
        ("!!python/object/apply:os.system [echo]", "constructor"),
        ("a: !!timestamp 2024-99-99", "month"),
        ("{[a]: 1}", "unhashable"),
    ],
)
def test_bombs_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_yaml(text)


def test_deep_json_is_refused() -> None:
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    for text in ("[" * 60 + "]" * 60, "[" * 100_000, '{"a":' * 51 + "1" + "}" * 51, "nul"):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_json(text)
