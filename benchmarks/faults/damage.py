"""Damage to good files, drawn from a seed: bytes, values of JSON, headers that claim what is not there."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

VALUES: tuple[Any, ...] = (
    -1, 0, 1, 3, 2**31, 2**62, 2**63, 2**64, 10**30, 0.5, -0.0, float("inf"), float("nan"), True, False, None, "", "x",
    "0", "\0", "\ud800", "a" * 5000, "../outside.safetensors", "/etc/passwd", [], {}, [[]], [None], {"": {}},
    [0] * 3000, ["x"] * 3000, "BF16", "F4", [2**32, 2**32], [0, 2**63],
)  # fmt: skip
"""What a value of a JSON file is replaced by."""

FILES = (
    "", ".", "..", "./", "../outside.safetensors", "a/../../outside.safetensors", "/etc/passwd", "//etc/passwd",
    "C:\\x", "..\\outside.safetensors", "\0", "x\0y", "\ud800", "x" * 300, "x/" * 200 + "y", "config.json", "assets",
    "none/here",
    "model.safetensors.index.json", "~/x", "$HOME/x", "%2e%2e/outside.safetensors", "folder", "pipe", " ",
)  # fmt: skip
"""Names that an index gives a shard."""


def damage_bytes(content: bytes, generator: random.Random, head: int = 0) -> bytes:
    """Return content after one to three changes of its bytes.

    Args:
        content: The good bytes.
        generator: Draws the changes.
        head: Changes fall into so many first bytes; 0 for all.
    """
    found = bytearray(content)
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(max(1, min(head or len(found), len(found))))
        size = generator.choice((1, 1, 2, 8, 64, 1000))
        kind = generator.randrange(7)
        if kind == 0:
            found[at : at + 1] = bytes([generator.randrange(256)])
        elif kind == 1:
            found[at : at + size] = generator.randbytes(size)
        elif kind == 2:
            del found[at : at + size]
        elif kind == 3:
            found[at:at] = found[at : at + size]
        elif kind == 4:
            found[at:at] = generator.choice(
                (b"[" * size, b"{", b"}", b'"', b",", b"\xff", b"9" * size, b"\\u0000", b"\n")
            )
        elif kind == 5:
            found[at : at + size] = bytes(size)
        else:
            del found[at:]
    return bytes(found)


def damage_json(document: Any, generator: random.Random) -> str:
    """Return the text of a JSON document after a change of one of its values, keys or of its text."""
    changed = copy.deepcopy(document)
    places = list(_places(changed))
    holder, key = generator.choice(places)
    kind = generator.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[generator.choice(("", "x", "\ud800", "__metadata__", "a" * 2000))] = holder.pop(key)
    elif kind == 2:
        return _twice(changed, generator)
    else:
        holder[key] = generator.choice(VALUES)
    return json.dumps(changed)


def _places(value: Any) -> Any:
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for index in range(min(len(value), 20)):
            yield value, index
            yield from _places(value[index])


def _twice(document: Any, generator: random.Random) -> str:
    """Return a text in which a key occurs twice, or whose nesting has no end."""
    text = json.dumps(document)
    if generator.randrange(2):
        return text[:-1] + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}"
    inner = text[1:-1]
    return "{" + inner + ", " + inner + "}"


def damage_safetensors(content: bytes, generator: random.Random) -> bytes:
    """Return a safetensors file with damage to its header, its length or its data."""
    (length,) = struct.unpack("<Q", content[:8])
    kind = generator.randrange(4)
    if kind == 0:
        return damage_bytes(content, generator, 8 + length)
    if kind == 1:
        claimed = generator.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(content), 100_000_001))
        return struct.pack("<Q", claimed) + content[8:]
    if kind == 2:
        return content[: generator.randrange(len(content))]
    header = json.loads(content[8 : 8 + length])
    packed = damage_json(header, generator).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(packed)) + packed + content[8 + length :]


def damage_index(content: bytes, generator: random.Random) -> bytes:
    """Return an index with damage to its text, its values or the names of its files."""
    kind = generator.randrange(3)
    if kind == 0:
        return damage_bytes(content, generator)
    document = json.loads(content)
    if kind == 1:
        return damage_json(document, generator).encode("utf-8", "surrogatepass")
    names = list(document["weight_map"])
    for name in generator.sample(names, generator.choice((1, 1, len(names)))):
        document["weight_map"][name] = generator.choice(FILES)
    return json.dumps(document).encode()


def damage_text_json(content: bytes, generator: random.Random) -> bytes:
    """Return a JSON file with damage to its text or its values."""
    if generator.randrange(3) == 0:
        return damage_bytes(content, generator)
    return damage_json(json.loads(content), generator).encode("utf-8", "surrogatepass")


def damage_lines(content: bytes, generator: random.Random) -> bytes:
    """Return JSON Lines with damage to their text or to the values of a line."""
    if generator.randrange(3) == 0:
        return damage_bytes(content, generator)
    lines = content.decode().splitlines()
    number = generator.randrange(len(lines))
    lines[number] = damage_json(json.loads(lines[number]), generator)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def greedy_headers(size: int) -> dict[str, bytes]:
    """Return headers of about `size` bytes that take far more memory when they are parsed."""
    pieces = {"empty lists": "[],", "empty objects": "{},", "floats": "0.5,", "short texts": '"x1",'}
    found = {name: f'{{"a":[{piece * (size // len(piece))}0]}}'.encode() for name, piece in pieces.items()}
    keys = ",".join(f'"{number:x}":""' for number in range(size // 10))
    found["metadata"] = f'{{"__metadata__":{{{keys}}}}}'.encode()
    entry = ',"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    tensors = "".join(entry % number for number in range(1, size // len(entry)))
    found["empty tensors"] = f"{{{tensors[1:]}}}".encode()
    found["nesting"] = b'{"a":' + b"[" * size
    found["objects in objects"] = b'{"a":' * (size // 5)
    found["one text"] = b'{"a":"' + b"x" * size + b'"}'
    found["one number"] = b'{"a":' + b"9" * size + b"}"
    return {name: struct.pack("<Q", len(content)) + content for name, content in found.items()}
