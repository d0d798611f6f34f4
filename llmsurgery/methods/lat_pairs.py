"""The own losses of targeted LAT, on pairs of a good and a bad completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmsurgery.methods.base import Operation
from llmsurgery.methods.templates import TemplateRows

if TYPE_CHECKING:
    import torch

    from llmsurgery.data.chat import Encoded
    from llmsurgery.methods.unlearn.lat import LatConfig
    from llmsurgery.train.attacked import RowsObjective
    from llmsurgery.train.losses import RowLoss, Term
    from llmsurgery.train.pairs import Margins
    from llmsurgery.train.scorer import Scorer


class LatPairs:
    """The own losses on pairs of a good and a bad completion, and what the adversary makes of them."""

    def __init__(
        self, config: LatConfig, operation: Operation, pairs: TemplateRows, retain: Sequence[Encoded], scorer: Scorer
    ) -> None:
        from llmsurgery.train.pairs import Margins

        self.config, self.operation, self.retain, self.scorer = config, operation, retain, scorer
        self.pairs, self.random = pairs, operation.training.random
        self.texts: dict[int, str] = {}
        self.margins: Margins | None = None
        if config.base == "preference":
            # The reference is that of one good completion, so each row keeps its own.
            self._draw(range(len(pairs.forget)))
            self.margins = Margins(scorer, pairs.forget, self.good, config.preference, operation.progress)

    def _draw(self, rows: Sequence[int]) -> None:
        self.texts.update({i: self.pairs.preferred[i] or self.random.choice(self.pairs.templates) for i in rows})

    def renew(self, rows: Sequence[int]) -> None:
        """Draw the template answers of an outer step."""
        if self.margins is None:
            self._draw(rows)

    def good(self, row: int) -> Encoded:
        """Return the prompt of a row with its good completion."""
        return self.pairs.pair(row, self.texts[row])

    def loss(self) -> RowLoss:
        """Return the defence, with the retain rows' terms."""
        from llmsurgery.train.losses import Partners, RowLoss
        from llmsurgery.train.pairs import benign_term, opposing_term

        config, session, rows = self.config, self.operation.training, len(self.pairs.forget)
        if self.margins is not None:
            forget = self._preference(self.margins)
        else:
            weights = config.toward_weight, config.away_weight
            forget = opposing_term(self.scorer, self.pairs.forget, self.good, *weights)
        retain = None
        if config.sft_weight or config.kl_weight:
            partners = Partners(len(self.retain), rows, config.training, session)
            weights, normalised = (config.sft_weight, config.kl_weight), config.kl_mode == "normalised"
            progress = self.operation.progress
            retain = benign_term(self.scorer, self.retain, partners, *weights, normalised, progress)
        return RowLoss(rows, session, forget, retain, self.pairs.record())

    def _preference(self, margins: Margins) -> Term:
        from llmsurgery.train.losses import Term
        from llmsurgery.train.pairs import preference_loss

        def value(indices: Sequence[int]) -> torch.Tensor:
            reference = margins.reference(indices)
            return preference_loss(margins(indices), reference, self.config.beta, self.config.preference).mean()

        return Term(value)

    def objective(self) -> RowsObjective:
        """Return what the adversary minimises: the defence with good and bad exchanged."""
        from llmsurgery.train.pairs import opposing_rows, preference_loss

        config = self.config

        def exchanged(indices: Sequence[int]) -> torch.Tensor:
            if (margins := self.margins) is not None:
                reference = margins.reference(indices)
                return preference_loss(-margins(indices), -reference, config.beta, config.preference).sum()
            bad, good = [self.pairs.forget[i] for i in indices], [self.good(i) for i in indices]
            toward = config.adversary_toward if config.targeted else 0.0
            return opposing_rows(self.scorer, bad, good, toward, config.adversary_away)

        return exchanged
