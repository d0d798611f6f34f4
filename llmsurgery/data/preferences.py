"""Preference pairs whose prompt stands within both sides, as many are published: the prompt is taken out."""

from __future__ import annotations

from collections.abc import Mapping

from llmsurgery.errors import InputError

ASSISTANT = "\n\nAssistant:"
"""What every answer follows in dialogues that are one string."""


def with_prompt(record: Mapping[str, object], where: str) -> Mapping[str, object]:
    """Return a pair with its prompt beside `chosen` and `rejected`; what has one of their kind is left alone.

    Sides that are lists of turns may begin with the prompt's turns, whether the key `prompt` holds its text or is
    missing. Sides that are strings then are whole dialogues, whose last "Assistant:" in common ends the prompt.

    Args:
        record: A record with `chosen` and `rejected`.
        where: File and line, for the message.

    Raises:
        InputError: The sides have no beginning in common, and there is no prompt.
    """
    prompt, chosen, rejected = (record.get(key) for key in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        turns = _shared_turns(chosen, rejected)
        asked: list[object] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else []
        count = len(turns)
        return {**record, "prompt": turns or asked, "chosen": chosen[count:], "rejected": rejected[count:]}
    if "prompt" in record or not isinstance(chosen, str) or not isinstance(rejected, str):
        return {"prompt": None, **record}
    apart = (i for i, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    shared = chosen[: next(apart, min(len(chosen), len(rejected)))]
    end = shared.rfind(ASSISTANT) + len(ASSISTANT)
    if end < len(ASSISTANT):
        raise InputError(
            f"{where}: chosen and rejected have no prompt",
            f"they do not begin with the same turns, the last of which is {ASSISTANT.strip()!r}",
            "add the key prompt",
        )
    return {**record, "prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _shared_turns(first: list[object], second: list[object]) -> list[object]:
    """Return the turns that two chats begin with; the last turn of each is its answer."""
    count = 0
    for one, other in zip(first[:-1], second[:-1], strict=False):
        if one != other:
            break
        count += 1
    return first[:count]
