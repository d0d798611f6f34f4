"""`neurons`: the MLP neurons of a checkpoint, read through its head; no model is loaded and nothing is changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.arch.detect import detect
from llmsurgery.arch.neurons import NeuronVectors, neuron_vectors
from llmsurgery.arch.spec import Structure, require_text_model
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.source import resolve_source
from llmsurgery.errors import InputError, UsageError

if TYPE_CHECKING:
    import torch

    from llmsurgery.compute.decode import Decoded, Vocabulary

SIDES = {"in": ("in",), "gate": ("gate",), "out": ("out",), "both": ("in", "out")}
"""Values of --side -> the vectors that are decoded."""

MAP_ROWS = 16
"""Tokens in the map of tokens and layers."""


@dataclass(frozen=True)
class NeuronsRequest:
    """What `neurons` is asked for; see `llmsurgery.api.neurons`."""

    model: str
    find: str | None
    layers: str | None
    side: str
    top: int
    tokens: int
    fold_norms: bool
    compare: str | None
    device: str


@dataclass(frozen=True)
class _Opened:
    """A checkpoint with the texts of its tokens and what may be named."""

    checkpoint: Checkpoint
    structure: Structure
    texts: Sequence[str | None]
    used: torch.Tensor


@dataclass(frozen=True)
class _Reading:
    """One side: which neuron each decoded row is, and what it says."""

    places: Sequence[NeuronVectors]
    decoded: Decoded

    def addresses(self) -> list[tuple[int, str, int | None, int]]:
        """Layer, part, expert and number of every row."""
        return [
            (place.tensor.layer or 0, place.part, place.tensor.expert, number)
            for place in self.places
            for number in range(place.count)
        ]


def find_neurons(request: NeuronsRequest, progress: Progress) -> dict[str, object]:
    """Decode neurons; see `llmsurgery.api.neurons` for the result."""
    from llmsurgery.compute.device import memory_errors, resolve_device

    if request.side not in SIDES:
        raise UsageError(f"unknown side {request.side!r}", f"choose one of {', '.join(SIDES)}", "")
    if request.top < 0 or request.tokens < 1:
        raise UsageError("a number is out of bounds", "--top >= 0, --tokens >= 1", "")
    device = resolve_device(request.device)
    opened = _open(request.model)
    layers = parse_layers(request.layers, opened.structure.layers)
    wanted = None if request.find is None else _wanted(opened, request.find)
    other = None if request.compare is None else _open_other(request.compare, opened)
    used = opened.used if other is None else opened.used & other.used
    with memory_errors():
        readings = _read(opened, used, request, layers, device, progress)
        document = _record(opened, request, layers, used, readings, wanted)
        if other is not None:
            document["compare"] = _compare(opened, other, used, request, layers, device, readings, progress)
    return document


def parse_layers(text: str | None, count: int) -> list[int] | None:
    """Return the block numbers of `0,3-5`, None for all.

    Raises:
        UsageError: It is something else, or a block does not exist.
    """
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise UsageError(f"layers {text!r} cannot be read", "numbers and ranges are expected", "--layers 0,3-5")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    if outside := sorted(layer for layer in layers if layer >= count):
        raise UsageError(
            f"layer {outside[0]} does not exist", f"the model has layers 0 to {count - 1}", "change --layers"
        )
    if not layers:
        raise UsageError(f"layers {text!r} hold no layer", "a range ends before it begins", "--layers 3-5")
    return sorted(layers)


def _open(model: str) -> _Opened:
    import torch

    from llmsurgery.compute.decode import head_name, trained_rows
    from llmsurgery.compute.load import load_tokenizer
    from llmsurgery.data.vocabulary import token_texts

    checkpoint = Checkpoint.open(resolve_source(model))
    structure = detect(checkpoint.config, checkpoint.tensors)
    require_text_model(structure, "neurons")
    texts = token_texts(load_tokenizer(checkpoint.root), checkpoint.info(head_name(structure)).rows)
    decodable = torch.tensor([text is not None for text in texts])
    return _Opened(checkpoint, structure, texts, decodable & trained_rows(checkpoint, structure))


def _open_other(model: str, opened: _Opened) -> _Opened:
    other = _open(model)
    if list(other.texts) != list(opened.texts):
        raise InputError(
            f"{model} has other tokens than {opened.checkpoint.root}",
            "the first tokens of neurons are compared by id",
            "compare checkpoints with the same tokenizer",
        )
    return other


def _wanted(opened: _Opened, word: str) -> list[int]:
    from llmsurgery.data.vocabulary import form_tokens

    ids = [number for number in form_tokens(opened.texts, word) if bool(opened.used[number])]
    if not ids:
        raise InputError(
            f"no form of {word!r} is a single token",
            "a neuron is named by single tokens",
            "look for the first token of the word, or for a shorter word of the same meaning",
        )
    return ids


def _read(
    opened: _Opened,
    used: torch.Tensor,
    request: NeuronsRequest,
    layers: Sequence[int] | None,
    device: torch.device,
    progress: Progress,
) -> dict[str, _Reading]:
    """Decode the sides that are asked for, matrix by matrix."""
    from llmsurgery.compute.decode import Decoded, decode_vectors, norm_gain, read_vectors, read_vocabulary

    checkpoint, structure = opened.checkpoint, opened.structure
    sides = {side: neuron_vectors(structure, side, layers) for side in SIDES[request.side]}
    final = norm_gain(checkpoint, structure, "norm.final") if request.fold_norms else None
    vocabulary: Vocabulary = read_vocabulary(checkpoint, structure, used, final, device)
    readings = {}
    with progress.task("neurons", sum(place.count for places in sides.values() for place in places)) as tick:
        for side, places in sides.items():
            parts: list[Decoded] = []
            for place in places:
                # What a neuron reads has been multiplied by the norm before the MLP, what it writes passes one after.
                role = "norm.mlp_post" if side == "out" else "norm.mlp"
                gain = norm_gain(checkpoint, structure, role, place.tensor.layer) if request.fold_norms else None
                for vectors in read_vectors(checkpoint, place):
                    folded = vectors if gain is None else vectors * gain
                    parts.append(decode_vectors(folded.to(device), vocabulary, request.tokens))
                    tick(len(vectors), f"layer {place.tensor.layer}")
            readings[side] = _Reading(places, Decoded.join(parts))
    return readings


def _record(
    opened: _Opened,
    request: NeuronsRequest,
    layers: Sequence[int] | None,
    used: torch.Tensor,
    readings: Mapping[str, _Reading],
    wanted: Sequence[int] | None,
) -> dict[str, object]:
    words = {side: _words(opened, reading) for side, reading in readings.items()} if len(readings) > 1 else {}
    agree = [bool(first & second) for first, second in zip(*words.values(), strict=True)] if words else None
    found = [hit for side, reading in readings.items() for hit in _hits(side, reading, wanted)]
    found.sort(key=lambda hit: (-hit[0], hit[1], hit[2]))
    addresses = {side: reading.addresses() for side, reading in readings.items()}
    listed = found[: request.top or None]
    document: dict[str, object] = {
        "path": str(opened.checkpoint.root),
        "layers": opened.structure.layers if layers is None else list(layers),
        "sides": list(readings),
        "decoded": {side: len(reading.decoded.ids) for side, reading in readings.items()},
        "vocabulary": {"tokens": len(opened.texts), "named": int(used.sum())},
        "fold_norms": request.fold_norms,
        "find": request.find,
        "forms": None if wanted is None else [opened.texts[number] for number in wanted],
        "found": len(found),
        "neurons": [
            _neuron(opened, side, addresses[side][row], readings[side].decoded, row, place, agree)
            for _, side, row, place in listed
        ],
        "map": _map(opened, readings, addresses, found, wanted),
    }
    if agree is not None:
        document["agreeing"] = sum(agree)
    return document


_Hit = tuple[float, str, int, int]
"""z of the token that a neuron is listed for, its side, its row, and the token's place among its first ones."""


def _hits(side: str, reading: _Reading, wanted: Sequence[int] | None) -> list[_Hit]:
    """Return the neurons that name a token: any, or one of those wanted."""
    import torch

    decoded = reading.decoded
    named = decoded.margin > 0
    if wanted is None:
        matches = torch.zeros_like(decoded.ids, dtype=torch.bool)
        matches[:, 0] = named
    else:
        matches = torch.isin(decoded.ids, torch.tensor(wanted)) & named[:, None]
    rows = matches.any(1).nonzero().squeeze(1)
    places = matches[rows].int().argmax(1)
    scores = decoded.scores[rows, places]
    return [
        (score, side, row, place)
        for score, row, place in zip(scores.tolist(), rows.tolist(), places.tolist(), strict=True)
    ]


def _neuron(
    opened: _Opened,
    side: str,
    address: tuple[int, str, int | None, int],
    decoded: Decoded,
    row: int,
    place: int,
    agree: Sequence[bool] | None,
) -> dict[str, object]:
    layer, part, expert, number = address
    ids, p, z = decoded.ids[row].tolist(), decoded.p[row].tolist(), decoded.scores[row].tolist()
    record: dict[str, object] = {
        "layer": layer,
        "neuron": number,
        "part": part,
        "expert": expert,
        "side": side,
        "z": z[place],
        "margin": float(decoded.margin[row]),
        "p": p[place],
        "token": opened.texts[ids[place]],
        "place": place + 1,
        "tokens": [
            {"id": token, "text": opened.texts[token], "p": chance, "z": score}
            for token, chance, score in zip(ids, p, z, strict=True)
        ],
    }
    if agree is not None:
        record["sides_agree"] = agree[row]
    return record


def _words(opened: _Opened, reading: _Reading) -> list[set[str]]:
    """Return the first words of every neuron, without blanks and case; none for a neuron that names no token."""
    named = (reading.decoded.margin > 0).tolist()
    plain = [(text or "").strip().lower() for text in opened.texts]
    return [
        {plain[token] for token in ids} - {""} if has_name else set()
        for ids, has_name in zip(reading.decoded.ids.tolist(), named, strict=True)
    ]


def _map(
    opened: _Opened,
    readings: Mapping[str, _Reading],
    addresses: Mapping[str, Sequence[tuple[int, str, int | None, int]]],
    found: Sequence[_Hit],
    wanted: Sequence[int] | None,
) -> dict[str, object]:
    """Return the largest z of each of some tokens in each layer: of those wanted, or those with the largest z."""
    layers = sorted({address[0] for rows in addresses.values() for address in rows})
    strongest: dict[int, dict[int, float]] = {}
    for z, side, row, place in found:
        token = int(readings[side].decoded.ids[row, place])
        of_token = strongest.setdefault(token, {})
        layer = addresses[side][row][0]
        of_token[layer] = max(z, of_token.get(layer, 0.0))
    tokens = list(strongest)[:MAP_ROWS]
    return {
        "layers": layers,
        "tokens": [opened.texts[token] for token in tokens],
        "z": [[strongest[token].get(layer, 0.0) for layer in layers] for token in tokens],
    }


def _compare(
    opened: _Opened,
    other: _Opened,
    used: torch.Tensor,
    request: NeuronsRequest,
    layers: Sequence[int] | None,
    device: torch.device,
    readings: Mapping[str, _Reading],
    progress: Progress,
) -> dict[str, object]:
    """Return the share of neurons whose first token is the same in both checkpoints."""
    theirs = _read(other, used, request, layers, device, progress)
    same: Counter[int] = Counter()
    total: Counter[int] = Counter()
    for side, reading in readings.items():
        here, there = reading.addresses(), theirs[side].addresses()
        if here != there:
            raise InputError(
                f"{request.compare} has other neurons than {request.model}",
                f"{len(here)} and {len(there)} vectors of the side {side}",
                "compare checkpoints of one architecture and size",
            )
        equal = reading.decoded.ids[:, 0] == theirs[side].decoded.ids[:, 0]
        for (layer, *_), agrees in zip(here, equal.tolist(), strict=True):
            total[layer] += 1
            same[layer] += agrees
    return {
        "path": str(other.checkpoint.root),
        "share": sum(same.values()) / sum(total.values()),
        "neurons": sum(total.values()),
        "layers": {str(layer): same[layer] / total[layer] for layer in sorted(total)},
    }
