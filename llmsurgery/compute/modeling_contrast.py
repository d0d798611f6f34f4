"""Contrastive decoding for vision-language models, as a logits processor; needs nothing but torch and transformers.

While a model generates, its logits l are compared with its logits l_cf after the same prompt without the picture:

    l_cd = (1 + alpha) l - alpha l_cf      where l >= max(l) + log(beta), else -inf

Both streams get the same tokens and keep their own keys and values. `generate` applies temperature, top-k and top-p
afterwards. Use it with the unchanged model:

    processor = ContrastLogitsProcessor.from_pretrained(DIRECTORY, model)
    model.generate(**inputs, logits_processor=[processor])
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

SETTINGS = "contrast.json"
"""File beside this code that holds the settings."""


def contrast(logits: torch.Tensor, content_free: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """Return contrastive logits [..., V].

    Args:
        logits: Logits with the picture [..., V]; a constant added to all of them changes nothing but a constant.
        content_free: Logits without it [..., V].
        alpha: Weight of the difference.
        beta: A token that is less likely than this share of the likeliest one is left out.
    """
    cutoff = logits.max(-1, keepdim=True).values + math.log(beta)
    difference = (1 + alpha) * logits - alpha * content_free
    return difference.masked_fill(logits < cutoff, -torch.inf)


def without_picture(ids: Sequence[int], image_id: int, kind: str, unknown_id: int | None = None) -> list[int]:
    """Return a prompt without content.

    Args:
        ids: The prompt; a picture is as many image tokens as it has patches.
        image_id: The image token.
        kind: "none" leaves the image tokens out, "unk" puts the unknown token in their places.
        unknown_id: The unknown token.
    """
    if kind == "none":
        return [token for token in ids if token != image_id]
    if unknown_id is None:
        raise ValueError("the tokenizer has no unknown token")
    return [unknown_id if token == image_id else token for token in ids]


@dataclass
class Stream:
    """The content-free side of one kind.

    Attributes:
        mask: 1 for tokens, 0 for padding on the left [batch, time].
        cache: Keys and values.
    """

    mask: torch.Tensor
    cache: Any


class ContrastLogitsProcessor(LogitsProcessor):
    """Takes away what the model says without the picture, while it generates.

    Args:
        model: The model that generates.
        image_id: Its image token.
        kinds: Content-free prompts, "none" or "unk"; the logits of several are averaged.
        alpha: Weight of the difference.
        beta: A token that is less likely than this share of the likeliest one is left out.
        unknown_id: The unknown token, for the kind "unk".
        pad_id: The token that fills shorter prompts on the left; None without padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_id: int,
        kinds: Sequence[str] = ("none",),
        alpha: float = 1.0,
        beta: float = 0.1,
        unknown_id: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        self.model = model
        self.image_id = image_id
        self.kinds = tuple(kinds)
        self.alpha, self.beta = alpha, beta
        self.unknown_id, self.pad_id = unknown_id, pad_id
        self.seen: torch.Tensor | None = None
        self.streams: list[Stream] = []

    @classmethod
    def from_pretrained(cls, path: str, model: PreTrainedModel, **settings: Any) -> ContrastLogitsProcessor:
        """Make the processor for a model that is loaded and on its device; `settings` replace those of the file."""
        stored = json.loads((Path(path) / SETTINGS).read_text("utf-8"))
        return cls(model, **{**stored, **settings})

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return contrastive logits [batch, V] for the token after `input_ids` [batch, time]."""
        known = self.seen is not None and torch.equal(self.seen, input_ids[:, :-1])
        if not known:
            # A new prompt, or other beams.
            self.streams = [self._start() for _ in self.kinds]
        each = [
            self._more(stream, input_ids[:, -1:]) if known else self._whole(stream, kind, input_ids)
            for stream, kind in zip(self.streams, self.kinds, strict=True)
        ]
        self.seen = input_ids.clone()
        content_free = torch.stack([logits.float() for logits in each]).mean(0)
        return contrast(scores.float(), content_free, self.alpha, self.beta)

    def _start(self) -> Stream:
        return Stream(torch.empty(0), DynamicCache(config=self.model.config.get_text_config()))

    def _whole(self, stream: Stream, kind: str, input_ids: torch.Tensor) -> torch.Tensor:
        """Run whole prompts; those of different length are filled on the left."""
        rows = [
            without_picture(self._unpadded(row), self.image_id, kind, self.unknown_id) for row in input_ids.tolist()
        ]
        width = max(map(len, rows))
        filler = 0 if self.pad_id is None else self.pad_id
        ids = torch.tensor([[filler] * (width - len(row)) + row for row in rows], device=input_ids.device)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        stream.mask = (torch.arange(width, device=ids.device) >= width - lengths[:, None]).long()
        return self._run(stream, ids)

    def _unpadded(self, row: list[int]) -> list[int]:
        start = next((place for place, token in enumerate(row) if token != self.pad_id), len(row) - 1)
        return row[start:]

    def _more(self, stream: Stream, ids: torch.Tensor) -> torch.Tensor:
        stream.mask = torch.cat([stream.mask, torch.ones_like(ids)], -1)
        return self._run(stream, ids)

    def _run(self, stream: Stream, ids: torch.Tensor) -> torch.Tensor:
        positions = (stream.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids,
            attention_mask=stream.mask,
            position_ids=positions,
            past_key_values=stream.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits
