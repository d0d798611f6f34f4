"""One pass over ordinary text that gathers the statistics of MLP keys of all layers asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.neurons import key_tensors
from llmsurgery.arch.spec import RoleTensor, Structure
from llmsurgery.compute.blocks import first_blocks
from llmsurgery.compute.cache import StatisticsCache
from llmsurgery.compute.head import backbone
from llmsurgery.compute.key_statistics import ENOUGH, KeyStatistics
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.stream import StreamedModel, in_memory
from llmsurgery.errors import DivergedError, InputError, UnsupportedError, UsageError

__all__ = ["KeyStatistics", "key_statistics"]

PASSAGE_TOKENS = 512
"""Longest passage that runs at once; a longer text is cut."""

BATCH_TOKENS = 4096
"""Tokens of a batch, padding included."""


class Passage(Protocol):
    """A row of plain text."""

    @property
    def answer(self) -> str:
        """The text."""


class EncodedText(Protocol):
    """A text as token ids."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids."""


class TextEncoder(Protocol):
    """What statistics need of an encoder."""

    max_length: int
    pad_id: int

    def encode_text(self, text: str, tokens: int) -> EncodedText:
        """Encode the first tokens of a plain text."""


def key_statistics(
    model: PreTrainedModel | StreamedModel,
    structure: Structure,
    layers: Iterable[int],
    texts: Sequence[Passage | str],
    encoder: TextEncoder,
    cache: StatisticsCache | None,
    tokens: int,
    progress: Progress,
    strict: bool = False,
) -> dict[int, KeyStatistics]:
    """Return the statistics of the keys of some layers, all of them in one pass over the text.

    Args:
        model: A causal language model in eval mode; blocks behind the last layer asked for are not run, and if it is
            streamed not read.
        structure: Its roles.
        layers: Block numbers.
        texts: Ordinary text; each begins as the tokenizer begins a text, the part beyond the model's context is left
            out.
        encoder: The model's encoder.
        cache: Where statistics are kept; None: nowhere.
        tokens: How many tokens to look at, the first of the texts.
        progress: Told of every batch, and of too few tokens.
        strict: Refuse fewer than five tokens per dimension.

    Returns:
        Block number -> statistics, in the order of `layers`.

    Raises:
        InputError: The texts have no token; with `strict`, they have too few.
        UnsupportedError: A layer has no dense or shared MLP.
        UsageError: `tokens` is not positive, or a layer does not exist.
    """
    if tokens < 1:
        raise UsageError(f"{tokens} tokens give no statistics", "at least one is needed", "raise the number of tokens")
    targets = key_targets(structure, layers)
    passages = first_passages(texts, encoder, tokens)
    count = sum(map(len, passages))
    require_enough(targets, count, tokens, progress, strict)
    digest = passages_digest(passages)
    device = in_memory(model).device
    found: dict[int, KeyStatistics] = {}
    for layer, target in targets.items():
        stored = None if cache is None else cache.load(cache_key(digest, count, target))
        if stored is not None:
            # Where new ones would be: another device solves with other last bits.
            keys, second = (None if part is None else part.to(device) for part in map(stored.get, ("keys", "second")))
            found[layer] = KeyStatistics(layer, key_width(target), count, keys, second)
    missing = {layer: target for layer, target in targets.items() if layer not in found}
    if missing:
        computed = _collect(model, structure, missing, passages, encoder.pad_id, progress)
        for layer, statistics in computed.items():
            named = {"keys": statistics.keys, "second": statistics.second}
            kept = {name: tensor for name, tensor in named.items() if tensor is not None}
            if cache is not None and (why := cache.save(cache_key(digest, count, missing[layer]), kept)):
                progress.notice(f"statistics of layer {layer} could not be cached: {why}")
        found |= computed
    return {layer: found[layer] for layer in targets}


def key_targets(structure: Structure, layers: Iterable[int]) -> dict[int, RoleTensor]:
    """Return the last MLP matrix of some layers.

    Raises:
        UnsupportedError: A layer has no dense or shared MLP.
    """
    numbers = tuple(dict.fromkeys(layers))
    by_layer = {tensor.layer: tensor for tensor in key_tensors(structure, numbers)}
    if absent := [layer for layer in numbers if layer not in by_layer]:
        raise UnsupportedError(
            f"block {absent[0]} has no dense MLP",
            "its MLP is routed experts, each with keys of its own",
            "leave it out",
        )
    return {layer: by_layer[layer] for layer in numbers}


def key_width(target: RoleTensor) -> int:
    """Return the number of coordinates of a key."""
    return target.shape[0] if target.transposed else target.shape[1]


def passages_digest(passages: Sequence[tuple[int, ...]]) -> str:
    """Return what stands for the text among what decides a statistic."""
    return hashlib.sha256(repr(passages).encode()).hexdigest()


def cache_key(digest: str, tokens: int, target: RoleTensor, name: str = "keys") -> dict[str, object]:
    """Return what decides a statistic of one layer, beside the model."""
    return {"name": name, "data": digest, "tokens": tokens, "layer": target.stored, "batch": BATCH_TOKENS}


def first_passages(texts: Sequence[Passage | str], encoder: TextEncoder, tokens: int) -> list[tuple[int, ...]]:
    """Return the first tokens of the texts, in pieces that run at once."""
    result: list[tuple[int, ...]] = []
    for text in texts:
        ids = encoder.encode_text(text if isinstance(text, str) else text.answer, encoder.max_length).ids[:tokens]
        result += [tuple(ids[start : start + PASSAGE_TOKENS]) for start in range(0, len(ids), PASSAGE_TOKENS)]
        tokens -= len(ids)
        if not tokens:
            break
    if not result:
        raise InputError("the texts for statistics have no token", "there is nothing to measure", "give longer texts")
    return result


def require_enough(targets: dict[int, RoleTensor], found: int, wanted: int, progress: Progress, strict: bool) -> None:
    """Say, or with `strict` refuse, that there are too few tokens."""
    size = max(map(key_width, targets.values()))
    if found >= ENOUGH * size:
        return
    what = f"{found} tokens for keys of {size} dimensions, {found / size:.1f} per dimension"
    why = f"below {ENOUGH} per dimension, directions that were merely not seen pass for unused ones"
    short = f"raise the number of tokens to {ENOUGH * size}" if found == wanted else "give more text"
    if strict:
        raise InputError(what, why, f"{short}, or do without strict")
    progress.notice(f"{what}: {why}; {short}")


def _batches(passages: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Group passages of similar length, longest first."""
    result: list[list[tuple[int, ...]]] = []
    for passage in sorted(passages, key=len, reverse=True):
        if not result or len(result[-1][0]) * (len(result[-1]) + 1) > BATCH_TOKENS:
            result.append([])
        result[-1].append(passage)
    return result


class _Collector:
    """Keys of one layer as they come: kept while fewer than coordinates are expected, else added up.

    Args:
        layer: Block number.
        size: Coordinates of a key.
        expected: Number of keys that will come.
        dtype: Their dtype.
        device: Where they are.
    """

    def __init__(self, layer: int, size: int, expected: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layer, self.size, self.count = layer, size, 0
        # Made here and not inside of inference mode, whose tensors cannot be changed later.
        self.keys = torch.empty(expected, size, dtype=dtype, device=device) if expected < size else None
        self.total = None if expected < size else torch.zeros(size, size, device=device)

    def add(self, keys: torch.Tensor) -> None:
        """Take in keys [n, size]."""
        if self.keys is not None:
            self.keys[self.count : self.count + len(keys)] = keys
        if self.total is not None:
            wide = keys.float()
            self.total.addmm_(wide.mT, wide)
        self.count += len(keys)

    def finish(self) -> KeyStatistics:
        """Return the statistics.

        Raises:
            DivergedError: A key is NaN or infinite.
        """
        second = None if self.total is None else self.total.div_(self.count)
        result = KeyStatistics(self.layer, self.size, self.count, self.keys, second)
        values = result.keys if result.second is None else result.second
        assert values is not None
        if not bool(torch.isfinite(values).all()):
            raise DivergedError(
                f"keys of layer {self.layer} are NaN or infinite",
                "an activation does not fit into the compute dtype",
                "use --dtype float32 or bfloat16",
            )
        return result


def _collect(
    model: PreTrainedModel | StreamedModel,
    structure: Structure,
    targets: dict[int, RoleTensor],
    passages: Sequence[tuple[int, ...]],
    pad_id: int,
    progress: Progress,
) -> dict[int, KeyStatistics]:
    """Run the passages through the blocks up to the last layer asked for."""
    plain, last = in_memory(model), max(targets)
    expected = sum(map(len, passages))
    place = (expected, plain.dtype, plain.device)
    collectors = {layer: _Collector(layer, key_width(target), *place) for layer, target in targets.items()}

    def forward(batch: Sequence[tuple[int, ...]]) -> None:
        ids, there = _padded(batch, pad_id, plain.device)
        handles = []
        for layer, target in targets.items():

            def catch(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], own: int = layer) -> None:
                collectors[own].add(inputs[0].reshape(-1, inputs[0].shape[-1])[there.reshape(-1).bool()])

            handles.append(plain.get_submodule(target.module).register_forward_pre_hook(catch))
        try:
            backbone(plain)(input_ids=ids, attention_mask=there, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    batches = _batches(passages)
    name = f"keys of {expected} tokens"
    if isinstance(model, StreamedModel):
        windows = model.windows([len(batch) * len(batch[0]) for batch in batches])
        with progress.task(name, len(windows) * (last + 1)) as tick:
            for window in windows:
                model.run([lambda batch=batch: forward(batch) for batch in batches[window]], last, tick)  # type: ignore[misc]
    else:
        with (
            progress.task(name, len(batches)) as tick,
            torch.inference_mode(),
            first_blocks(plain, structure, last + 1),
        ):
            for batch in batches:
                forward(batch)
                tick()
    return {layer: collector.finish() for layer, collector in collectors.items()}


def _padded(batch: Sequence[tuple[int, ...]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask [batch, time] of passages, padded on the right."""
    time = max(map(len, batch))
    ids = torch.tensor([[*passage, *[pad_id] * (time - len(passage))] for passage in batch])
    there = torch.tensor([[1] * len(passage) + [0] * (time - len(passage)) for passage in batch])
    return ids.to(device), there.to(device)
