"""Directions that keys take, kept on disk: their second moment is decomposed once per model and text.

With C = V S V^T as in `key_statistics`, what is kept of a layer is S and V^T in float32. A later run reads the rows
that it needs, of one layer at a time, and neither keys nor C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import Structure
from llmsurgery.compute.cache import StatisticsCache
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.statistics import (
    KeyStatistics,
    Passage,
    TextEncoder,
    cache_key,
    first_passages,
    key_statistics,
    key_targets,
    key_width,
    passages_digest,
    require_enough,
)
from llmsurgery.compute.stream import StreamedModel
from llmsurgery.errors import ResourceError

_NAME = "key directions"


@dataclass(frozen=True, eq=False)
class Directions:
    """Eigenvalues and eigenvectors of the second moment of one block's keys.

    Attributes:
        layer: Block number.
        size: Number of coordinates of a key.
        tokens: Number of keys that were seen.
        values: Eigenvalues that are not zero, descending, float64 [r].
        read: Returns their eigenvectors as rows, float32 [r, size].
    """

    layer: int
    size: int
    tokens: int
    values: torch.Tensor
    read: Callable[[], torch.Tensor]

    def spectrum(self) -> torch.Tensor:
        """Return the eigenvalues that are not zero, descending, float64."""
        return self.values

    def protected(self, tau: float) -> torch.Tensor:
        """Return the eigenvectors with an eigenvalue of at least tau as columns [size, b], float32, on the CPU."""
        count = int((self.values >= tau).sum())
        if not count:
            return torch.empty(self.size, 0)
        return self.read()[:count].T


def key_directions(
    model: PreTrainedModel | StreamedModel,
    structure: Structure,
    layers: Iterable[int],
    texts: Sequence[Passage | str],
    encoder: TextEncoder,
    cache: StatisticsCache | None,
    tokens: int,
    progress: Progress,
    strict: bool = False,
) -> dict[int, Directions]:
    """Return the directions that the keys of some layers take over ordinary text.

    Arguments and errors are those of `key_statistics`, which computes what the cache does not have.

    Returns:
        Block number -> directions, in the order of `layers`.
    """
    targets = key_targets(structure, layers)
    passages = first_passages(texts, encoder, tokens)
    digest, count = passages_digest(passages), sum(map(len, passages))
    found: dict[int, Directions] = {}
    for layer, target in targets.items():
        key = cache_key(digest, count, target, _NAME)
        stored = None if cache is None else cache.load(key)
        if cache is not None and stored is not None:
            # What was loaded is mapped, and goes when nothing points to it.
            found[layer] = Directions(layer, key_width(target), count, stored["values"].clone(), _reader(cache, key))
    missing = [layer for layer in targets if layer not in found]
    if not missing:
        require_enough(targets, count, tokens, progress, strict)
        return {layer: found[layer] for layer in targets}
    computed = key_statistics(model, structure, missing, texts, encoder, cache, tokens, progress, strict)
    with progress.task("directions of keys", len(missing)) as tick:
        for layer in missing:
            values, rows = _decompose(computed.pop(layer))
            key = cache_key(digest, count, targets[layer], _NAME)
            read = _holder(rows)
            if cache is not None:
                if why := cache.save(key, {"values": values, "rows": rows}):
                    progress.notice(f"directions of the keys of layer {layer} could not be cached: {why}")
                else:
                    read = _reader(cache, key)
            found[layer] = Directions(layer, key_width(targets[layer]), count, values, read)
            tick()
    return {layer: found[layer] for layer in targets}


def _decompose(statistics: KeyStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues, and eigenvectors as rows in float32."""
    values = statistics.spectrum().cpu()
    return values, statistics.protected(0.0).T.float().cpu().contiguous()


def _holder(rows: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: rows


def _reader(cache: StatisticsCache, key: dict[str, object]) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        stored = cache.load(key)
        if stored is None:
            raise ResourceError(
                "cached statistics are gone", "the cache was emptied while they were in use", "start the run again"
            )
        return stored["rows"]

    return read
