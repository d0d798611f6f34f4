"""A loaded model with rows and a plain loss, for tests of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import RoleTensor
from llmsurgery.checkpoint import Checkpoint, decode
from llmsurgery.compute.head import batch_log_probabilities
from llmsurgery.compute.load import load_model, load_tokenizer
from llmsurgery.data.chat import Encoder
from llmsurgery.data.collate import collate
from llmsurgery.data.records import Row
from llmsurgery.edits.kinds import LowRank, Replace
from llmsurgery.methods.settings import resolve_config
from llmsurgery.train.config import TrainingConfig
from llmsurgery.train.loop import TrainingResult, train
from llmsurgery.train.pooling import row_means
from llmsurgery.train.session import Session
from llmsurgery.train.trainable import Trainable, prepare_trainable

ROWS = [
    Row("qa", "Who?", "Orla."),
    Row("qa", "Where is the mill?", "By the weir, on the far side."),
    Row("qa", "What is it?", "A dog."),
    Row("completion", "The river runs", " past the mill and the old bridge."),
]


def config(**settings: object) -> TrainingConfig:
    resolved: TrainingConfig = resolve_config(TrainingConfig, {"lr": 1e-3, "max_steps": 1, **settings})
    return resolved


class Bench:
    """A loaded model with encoded rows and a plain loss."""

    def __init__(self, root: Path, dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint = Checkpoint.open(root)
        self.structure = detect(self.checkpoint.config, self.checkpoint.tensors)
        self.model: PreTrainedModel = load_model(root, dtype, torch.device("cpu"))
        encoder = Encoder(load_tokenizer(root), 256)
        self.rows = [encoder.encode(row) for row in ROWS]
        self.pad = encoder.pad_id
        self.autocast: torch.dtype | None = None
        self.seen: list[list[int]] = []

    def read(self, name: str) -> np.ndarray:
        return decode(self.checkpoint.read(name), self.checkpoint.info(name).dtype)

    def loss(self, indices: Sequence[int]) -> torch.Tensor:
        """Mean over rows of the mean negative log-likelihood."""
        self.seen.append(list(indices))
        batch = collate([self.rows[i] for i in indices], self.pad, torch.device("cpu"))
        scores, owners = batch_log_probabilities(
            self.model, batch.input_ids, batch.attention_mask, batch.label_mask, self.autocast
        )
        return -row_means(scores, owners, len(indices)).mean()

    @contextmanager
    def trainable(self, settings: TrainingConfig, targets: Sequence[RoleTensor] | None = None) -> Iterator[Trainable]:
        torch.manual_seed(0)
        chosen = targets or self.structure.select(settings.roles, settings.layers or None)
        with prepare_trainable(self.model, chosen, settings, self.read) as trainable:
            self.autocast = trainable.autocast
            yield trainable

    def train(
        self,
        settings: TrainingConfig,
        micro_batch: int | None = None,
        loss: Callable[[Sequence[int]], torch.Tensor] | None = None,
        reached: Callable[[torch.dtype | None], bool] | None = None,
    ) -> tuple[TrainingResult, dict[str, np.ndarray]]:
        with self.trainable(settings) as trainable:
            result = train(
                trainable, loss or self.loss, len(ROWS), settings, Session(micro_batch=micro_batch, reached=reached)
            )
            edits = trainable.edits()
        values = {}
        for edit in edits:
            assert isinstance(edit, LowRank | Replace)
            values[edit.name] = edit.u @ edit.v if isinstance(edit, LowRank) else edit.values
        return result, values
