"""Second moments of MLP keys: which directions ordinary text uses, and systems of equations with them.

The key of a token in a block is the input of the block's last MLP matrix, k [size]. Over ordinary text, padding left
out and the mean not taken off,

    C = E[k k^T] = K^T K / n,    K [n, size] the keys of n tokens.

With fewer tokens than dimensions the keys themselves are kept instead of C. C = K^T K / n and G = K K^T / n have the
same eigenvalues but for zeros, and G is the smaller matrix; what no key reaches is the null space, exactly. No
size x size matrix is formed then, let alone decomposed: with m = size, n tokens cost n^2 m instead of m^3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.neurons import key_tensors
from llmsurgery.arch.spec import RoleTensor, Structure
from llmsurgery.compute.blocks import first_blocks
from llmsurgery.compute.cache import StatisticsCache
from llmsurgery.compute.head import backbone
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.stream import StreamedModel, in_memory
from llmsurgery.errors import DivergedError, InputError, SurgeryError, UnsupportedError, UsageError

ENOUGH = 5
"""Tokens per dimension below which directions that were merely not seen pass for unused ones."""

PASSAGE_TOKENS = 512
"""Longest passage that runs at once; a longer text is cut."""

BATCH_TOKENS = 4096
"""Tokens of a batch, padding included."""

_ROWS = 2048
"""Keys that are widened to float64 at once."""


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Second moment of the inputs of one block's mlp.down over ordinary text.

    Attributes:
        layer: Block number.
        size: Number of coordinates of a key.
        tokens: Number of keys that were seen.
        keys: The keys [tokens, size] in the compute dtype, if there are fewer of them than coordinates, else None.
        second: E[k k^T] [size, size], fp32, if there are more, else None.
    """

    layer: int
    size: int
    tokens: int
    keys: torch.Tensor | None = None
    second: torch.Tensor | None = None

    @classmethod
    def of_keys(cls, layer: int, keys: torch.Tensor) -> KeyStatistics:
        """Return the statistics of keys [tokens, size]."""
        tokens, size = keys.shape
        if tokens < size:
            return cls(layer, size, tokens, keys=keys)
        second = torch.zeros(size, size, device=keys.device)
        for part in torch.split(keys, _ROWS):
            second.addmm_(part.float().mT, part.float())
        return cls(layer, size, tokens, second=second.div_(tokens))

    @property
    def enough(self) -> bool:
        """Whether there are at least five tokens per dimension."""
        return self.tokens >= ENOUGH * self.size

    def merge(self, other: KeyStatistics) -> KeyStatistics:
        """Return the statistics of both streams of keys together.

        Raises:
            SurgeryError: They are of different layers or sizes.
        """
        if (self.layer, self.size) != (other.layer, other.size):
            raise SurgeryError(f"statistics of layers {self.layer} and {other.layer} cannot be merged")
        if self.keys is not None and other.keys is not None:
            return KeyStatistics.of_keys(self.layer, torch.cat((self.keys, other.keys)))
        total = self.tokens + other.tokens
        second = self.moment() * (self.tokens / total) + other.moment() * (other.tokens / total)
        return KeyStatistics(self.layer, self.size, total, second=second)

    def moment(self) -> torch.Tensor:
        """Return C [size, size], fp32."""
        if self.second is not None:
            return self.second
        keys = self._rows()
        return (keys.mT @ keys).div_(self.tokens).float()

    def _rows(self) -> torch.Tensor:
        """Return the keys [tokens, size], float64."""
        assert self.keys is not None
        return self.keys.double()

    @cached_property
    def _gram(self) -> torch.Tensor:
        """K K^T [tokens, tokens], float64."""
        rows = self._rows()
        return rows @ rows.mT

    @cached_property
    def mean_square(self) -> float:
        """Mean of the diagonal of C: the mean square of a coordinate."""
        if self.second is not None:
            return float(self.second.diagonal().double().mean())
        return float(self._gram.diagonal().sum()) / (self.tokens * self.size)

    @cached_property
    def _decomposition(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues of C that are not zero, descending, and their eigenvectors as columns: of C, or of K K^T."""
        matrix = self._gram / self.tokens if self.second is None else self.second.double()
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values.flip(0), vectors.flip(1)
        # C was summed in fp32, and nothing below its rounding is known; the Gram matrix is summed in float64.
        wide, single = (torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32))
        rank = int((values > values[0] * (self.size * wide if self.second is None else single)).sum())
        return values[:rank], vectors[:, :rank]

    def spectrum(self) -> torch.Tensor:
        """Return the eigenvalues of C that are not zero, descending, float64."""
        return self._decomposition[0]

    def protected(self, tau: float) -> torch.Tensor:
        """Return the directions that ordinary text uses.

        Args:
            tau: Smallest eigenvalue of C, a mean square, that counts as used.

        Returns:
            V [size, b], float64, orthonormal columns: the eigenvectors of C whose eigenvalue is not zero and at least
            tau. P k = k - V (V^T k) takes them out of a vector.
        """
        values, vectors = self._decomposition
        count = int((values >= tau).sum())
        vectors = vectors[:, :count]
        if self.second is not None:
            return vectors
        # C K^T u = K^T G u: a right singular vector of K, as long as the square root of its eigenvalue.
        basis = (self._rows().mT @ vectors) / (values[:count] * self.tokens).sqrt()
        # Small eigenvalues lose digits to the rounding of the large ones; the span is right, the angles are mended.
        orthonormal: torch.Tensor = torch.linalg.qr(basis).Q
        return orthonormal

    def solve(self, right: torch.Tensor, ridge: float) -> torch.Tensor:
        """Return (C + ridge * mean(diag C) * I)^-1 right.

        By Cholesky; with fewer tokens than dimensions by Woodbury's identity on K K^T.

        Args:
            right: One or more vectors [size] or [size, columns].
            ridge: Share of the mean diagonal that is added.

        Returns:
            The solution, shaped as `right`, float64.

        Raises:
            UsageError: The matrix is singular.
        """
        device = (self.second if self.keys is None else self.keys).device  # type: ignore[union-attr]
        columns = right.to(device, torch.float64)
        columns = columns[:, None] if right.dim() == 1 else columns
        damping = ridge * self.mean_square
        if self.second is not None:
            matrix = self.second.double()
        else:
            # (damping I + K^T K / n)^-1 = (I - K^T (n damping I + K K^T)^-1 K) / damping
            matrix = self._gram.clone()
            if damping <= 0:
                raise self._singular(ridge)
        matrix.diagonal().add_(damping * (1 if self.second is not None else self.tokens))
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            raise self._singular(ridge)
        if self.second is not None:
            solved = torch.cholesky_solve(columns, factor)
        else:
            rows = self._rows()
            solved = (columns - rows.mT @ torch.cholesky_solve(rows @ columns, factor)) / damping
        return solved[:, 0] if right.dim() == 1 else solved

    def _singular(self, ridge: float) -> UsageError:
        return UsageError(
            f"the second moment of layer {self.layer} has no inverse with a ridge of {ridge:g}",
            f"{self.tokens} tokens do not fill the {self.size} dimensions of a key",
            "raise the ridge, or take more tokens",
        )


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
    targets = _targets(structure, layers)
    passages = _passages(texts, encoder, tokens)
    count = sum(map(len, passages))
    _require_enough(targets, count, tokens, progress, strict)
    digest = hashlib.sha256(repr(passages).encode()).hexdigest()
    found: dict[int, KeyStatistics] = {}
    for layer, target in targets.items():
        stored = None if cache is None else cache.load(_key(digest, count, target))
        if stored is not None:
            found[layer] = KeyStatistics(layer, _width(target), count, stored.get("keys"), stored.get("second"))
    missing = {layer: target for layer, target in targets.items() if layer not in found}
    if missing:
        computed = _collect(model, structure, missing, passages, encoder.pad_id, progress)
        for layer, statistics in computed.items():
            named = {"keys": statistics.keys, "second": statistics.second}
            kept = {name: tensor for name, tensor in named.items() if tensor is not None}
            if cache is not None and (why := cache.save(_key(digest, count, missing[layer]), kept)):
                progress.notice(f"statistics of layer {layer} could not be cached: {why}")
        found |= computed
    return {layer: found[layer] for layer in targets}


def _targets(structure: Structure, layers: Iterable[int]) -> dict[int, RoleTensor]:
    numbers = tuple(dict.fromkeys(layers))
    by_layer = {tensor.layer: tensor for tensor in key_tensors(structure, numbers)}
    if absent := [layer for layer in numbers if layer not in by_layer]:
        raise UnsupportedError(
            f"block {absent[0]} has no dense MLP",
            "its MLP is routed experts, each with keys of its own",
            "leave it out",
        )
    return {layer: by_layer[layer] for layer in numbers}


def _width(target: RoleTensor) -> int:
    return target.shape[0] if target.transposed else target.shape[1]


def _key(digest: str, tokens: int, target: RoleTensor) -> dict[str, object]:
    return {"name": "keys", "data": digest, "tokens": tokens, "layer": target.stored, "batch": BATCH_TOKENS}


def _passages(texts: Sequence[Passage | str], encoder: TextEncoder, tokens: int) -> list[tuple[int, ...]]:
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


def _require_enough(targets: dict[int, RoleTensor], found: int, wanted: int, progress: Progress, strict: bool) -> None:
    size = max(map(_width, targets.values()))
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
    collectors = {layer: _Collector(layer, _width(target), *place) for layer, target in targets.items()}

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
