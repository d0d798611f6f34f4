"""What an edit of a model in memory reaches and what it disturbs, compared with the model before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import Structure
from llmsurgery.compute.progress import Silent
from llmsurgery.data.chat import Encoded
from llmsurgery.evaluate.likelihood import text_hidden, text_kl
from llmsurgery.evaluate.redirection import Probe, redirect_figures, reference_of

BATCH_ROWS = 8


class Disturbance:
    """Compares a model with what it was when this was made.

    Args:
        model: A causal language model in eval mode.
        structure: Its roles.
        probes: Prompts with old and new names: those that the edit is made from and others.
        texts: Ordinary text.
        pad_id: Token id for padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        structure: Structure,
        probes: Sequence[Probe],
        texts: Sequence[Encoded],
        pad_id: int,
    ) -> None:
        self._common = (model, structure, probes, pad_id)
        self._texts, self._pad_id, self._model = texts, pad_id, model
        self._reference = reference_of(*self._common, (0,))
        self._hidden = self._read()
        self._before = self._distance()

    def _read(self) -> list[torch.Tensor]:
        return text_hidden(self._model, self._texts, self._pad_id, BATCH_ROWS, Silent())

    def _distance(self) -> float:
        return redirect_figures(*self._common, self._reference)["redirect.kl_paraphrase"].number

    def measure(self) -> tuple[float, float]:
        """Return the share of the KL divergence after other prompts that is left, and the KL divergence on the text."""
        assert self._reference.head is not None
        moved = text_kl(self._hidden, self._read(), self._reference.head, self._model)
        spilled = float(np.concatenate(moved).mean())
        return self._distance() / self._before, spilled
