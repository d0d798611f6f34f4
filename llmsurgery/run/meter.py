"""All figures of a run, of the source and of the result alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmsurgery.checkpoint import Checkpoint
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.methods.tasks import TASKS
from llmsurgery.run.notices import Notices
from llmsurgery.run.prepare import Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmsurgery.compute.halving import Halving
    from llmsurgery.compute.stream import StreamedModel
    from llmsurgery.evaluate.figures import Measurement
    from llmsurgery.evaluate.flips import Expected
    from llmsurgery.evaluate.intervals import Figure
    from llmsurgery.evaluate.recovery import Recovery
    from llmsurgery.evaluate.redirection import RedirectReference
    from llmsurgery.evaluate.scores import SetScores


@dataclass(frozen=True)
class Meter:
    """Measures the models of one run; it keeps none of them.

    Attributes:
        prepared: The checked request.
        notices: Told of long work and notices.
        rows: Rows per forward.
    """

    prepared: Prepared
    notices: Notices
    rows: Halving

    def score_retain_model(self) -> Mapping[str, SetScores] | None:
        """Load and score the model that never saw the forget rows; None if none is given."""
        from llmsurgery.run.reference import score_retain_model

        request, retained = self.prepared.request, self.prepared.retained
        if retained is None:
            return None
        options = (self.prepared.device, request.dtype, request.trust_remote_code)
        return self.rows.run(
            lambda size: score_retain_model(retained, self.prepared.rows, self._sized(size), *options, self.notices)
        )

    def measure_source(
        self,
        model: PreTrainedModel,
        streamed: StreamedModel | None,
        retained: Mapping[str, SetScores] | None,
        recovery: Recovery | None,
    ) -> Measurement:
        """Measure the source, and keep what the result is compared with.

        Args:
            model: The source.
            streamed: The same, if it is read block by block; `model` is then its stock model.
            retained: Scores of the model that never saw the forget rows.
            recovery: What refusals and the task are measured by; None for other tasks.
        """
        measured = self._usual(streamed or model, None, retained)
        measured = self._with_pruning(streamed or model, self.prepared.checkpoint, measured)
        measured = self._with_linearity(model, measured)
        measured = self._with_redirection(model, measured, None)
        measured = self._with_pictures(model, measured, None)
        return self._with_recovery(model, measured, recovery)

    def measure_result(
        self,
        model: PreTrainedModel,
        streamed: StreamedModel | None,
        checkpoint: Checkpoint,
        written: Path,
        before: Measurement,
    ) -> Measurement:
        """Measure the result as the source was.

        Args:
            model: The result, loaded again.
            streamed: The same, if it is read block by block; `model` is then its stock model.
            checkpoint: The weights that it was loaded from.
            written: What was written: a checkpoint, or what was loaded onto the source.
            before: The measured source.
        """
        measured = self._usual(streamed or model, before, before.retained)
        measured = self._with_pruning(streamed or model, checkpoint, measured)
        measured = self._with_linearity(model, measured)
        measured = self._with_redirection(model, measured, before.redirected)
        measured = self._with_pictures(model, measured, written)
        return self._with_recovery(model, measured, before.recovery)

    def _sized(self, size: int) -> EvaluationConfig:
        return dataclasses.replace(self.prepared.evaluation, batch_size=size)

    def _usual(
        self,
        model: PreTrainedModel | StreamedModel,
        before: Measurement | None,
        retained: Mapping[str, SetScores] | None,
    ) -> Measurement:
        """Measure what every operation has figures of; without `before` the model is the source."""
        from llmsurgery.evaluate.figures import measure

        reference = None if before is None else before.reference
        data, encoder = self.prepared.measured, self.prepared.encoder
        return self.rows.run(
            lambda size: measure(
                model, encoder, data, self._sized(size), self.notices, reference, before is None, retained
            )
        )

    def _with_pruning(
        self, model: PreTrainedModel | StreamedModel, checkpoint: Checkpoint, measured: Measurement
    ) -> Measurement:
        """Add the figures of pruning, if that is what is done."""
        spec = self.prepared.method.spec
        if "pruning" not in TASKS[spec.task].measures:
            return measured
        from llmsurgery.evaluate.pruning import with_pruning_figures

        return with_pruning_figures(measured, checkpoint, model, self.prepared.measured.texts, spec.structured)

    def _with_linearity(self, model: PreTrainedModel, measured: Measurement) -> Measurement:
        """Add how linear the norms are, if removing them is what is done."""
        if "norms" not in TASKS[self.prepared.method.spec.task].measures:
            return measured
        from llmsurgery.evaluate.linearity import with_linearity_figures

        return with_linearity_figures(measured, model, self.prepared.structure, self.prepared.measured.texts)

    def _with_redirection(
        self, model: PreTrainedModel, measured: Measurement, reference: RedirectReference | None
    ) -> Measurement:
        """Add the figures of a redirection, if that is what is done; without a reference the model is the source."""
        from llmsurgery.evaluate.flips import flip_figure
        from llmsurgery.evaluate.redirection import redirect_figures, reference_of

        prepared = self.prepared
        if prepared.concepts:
            from llmsurgery.evaluate.concept import concept_figure

            own = {"concept.prob": concept_figure(model, prepared.concepts)}
            return dataclasses.replace(measured, figures={**own, **measured.figures})
        if not prepared.probes:
            return measured
        common = (model, prepared.structure, prepared.probes, prepared.encoder.pad_id)
        if reference is None:
            blocks = sorted({target.layer for target in prepared.targets if target.layer is not None})
            found = reference_of(*common, blocks)
            reference = dataclasses.replace(found, expected=self._expected_answers(model))
            measured = dataclasses.replace(measured, redirected=reference)
        figures = redirect_figures(*common, reference)
        figures |= flip_figure(measured.answers.get("forget", []), reference.expected)
        return dataclasses.replace(measured, figures={**figures, **measured.figures})

    def _expected_answers(self, source: PreTrainedModel) -> Mapping[int, Expected]:
        from llmsurgery.evaluate.flips import expected_answers

        data, encoder, pairs = self.prepared.measured, self.prepared.encoder, self.prepared.pairs
        return self.rows.run(
            lambda size: expected_answers(source, encoder, data, pairs, self._sized(size), self.notices)
        )

    def _with_pictures(self, model: PreTrainedModel, measured: Measurement, written: Path | None) -> Measurement:
        """Add the figures of questions about pictures, if there are any; a result may bring a logits processor."""
        data = self.prepared.pictured
        if data is None:
            return measured
        from llmsurgery.compute.bundle import contrast_processor
        from llmsurgery.evaluate.pictured import measure_pictured

        decoder = None if written is None else contrast_processor(model, written)
        found = self.rows.run(lambda size: measure_pictured(model, data, size, self.notices, decoder))
        return dataclasses.replace(measured, figures={**found, **measured.figures})

    def _with_recovery(self, model: PreTrainedModel, measured: Measurement, recovery: Recovery | None) -> Measurement:
        """Add the figures of a recovery, if that is what is done."""
        if recovery is None:
            return measured

        def figures(size: int) -> dict[str, Figure]:
            sized = dataclasses.replace(recovery, config=dataclasses.replace(recovery.config, batch_size=size))
            return sized.figures(model, self.notices)

        found = self.rows.run(figures)
        return dataclasses.replace(measured, figures={**found, **measured.figures}, recovery=recovery)
