"""Notices: what is worth knowing of a run and is no error, on the screen and in the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmsurgery.arch.spec import LINEAR_ROLES
from llmsurgery.compute.progress import Progress
from llmsurgery.run.prepare import Prepared

if TYPE_CHECKING:
    from llmsurgery.data.records import Row
    from llmsurgery.evaluate.figures import Measurement

NF4_BLOCK = 64
"""Entries that share a scale in bitsandbytes' nf4."""

RETAIN_WARNING = 0.05
"""A retain score that falls by more than this share is worth a notice."""

PERPLEXITY_WARNING = 1.5
"""A perplexity that grows by more than this factor is worth a notice."""


class Notices:
    """Passes progress through and keeps the notices for the manifest."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.messages: list[str] = []
        self.task = progress.task

    def notice(self, message: str) -> None:
        """Tell the user, and remember."""
        self.messages.append(message)
        self.progress.notice(message)


def warn_of_overlap(prepared: Prepared, notices: Notices) -> None:
    """Say so where rows that are to be forgotten are to be kept as well: training then pulls at them both ways."""
    forget = prepared.rows.get("forget", ())
    for name in ("retain", "guard"):
        kept: dict[str, set[str]] = {}
        for row in prepared.rows.get(name, ()):
            kept.setdefault(_asked(row), set()).add(_words(row.answer))
        asked = [row for row in forget if _asked(row) in kept]
        same = sum(_words(row.answer) in kept[_asked(row)] for row in asked)
        if asked:
            notices.notice(
                f"{len(asked)} of {len(forget)} rows of --forget have a prompt that --{name} has too, {same} of them "
                "with the same answer: they are to be forgotten and kept at once; take them out of one file"
            )


def warn_of_questions(prepared: Prepared, notices: Notices) -> None:
    """Say which questions of --mcq are left out, and where the figures are of what the method has seen."""
    choices = prepared.asked.choices
    if choices is not None and choices.skipped:
        notices.notice(f"{choices.skipped} questions of --mcq have another number than {choices.options} options")
    if prepared.asked and getattr(prepared.config, "holdout", None) == 0:
        notices.notice("holdout=0: the figures are measured on the records that the method learns from")


def _asked(row: Row) -> str:
    """Return what a row asks; a passage of text asks for itself."""
    return _words(row.prompt or row.answer)


def _words(text: str) -> str:
    return " ".join(text.split()).casefold()


def warn_of_spill(before: Measurement, after: Measurement, notices: Notices) -> None:
    """Say so where retain figures fell with the forget figures, or ordinary text suffered."""
    name = "retain.token_prob"
    if name in before.figures:
        earlier, later = before.figures[name].number, after.figures[name].number
        if earlier > 0 and later < (1 - RETAIN_WARNING) * earlier:
            notices.notice(f"{name} fell by {1 - later / earlier:.0%}: the operation reached beyond the forget set")
    ratio = after.figures.get("utility.ppl_ratio")
    if ratio is not None and ratio.value is not None and ratio.value > PERPLEXITY_WARNING:
        notices.notice(
            f"utility.ppl_ratio is {ratio.value:.4g}: ordinary text suffered; lower the step size or strength"
        )


def warn_of_rounding(
    prepared: Prepared, record: Mapping[str, object], before: Measurement, after: Measurement, notices: Notices
) -> None:
    """Say so where the stop rule held on the quantised model in training and does not on the result."""
    rule = prepared.until
    if rule is None or record.get("stopped") != "until" or prepared.request.quantize == "none":
        return
    earlier, later = before.figures[rule.metric].number, after.figures[rule.metric].number
    if not rule.holds(later, earlier):
        notices.notice(
            f"--until {rule} held on the {prepared.request.quantize} model in training, not on the result "
            f"({later:.4g}); a stricter bound makes up for the rounding"
        )


def warn_of_nf4(prepared: Prepared, notices: Notices) -> None:
    """Say so where bitsandbytes on the CPU (0.50) reads nf4 matrices wrongly: rows that are no multiple of its blocks.

    Training then sees weights that are two to three times as coarse; stored weights and figures are not touched by it.
    """
    if prepared.request.quantize != "nf4" or prepared.device.type != "cpu":
        return
    matrices = [
        tensor for tensor in prepared.structure.tensors if tensor.role in LINEAR_ROLES and len(tensor.shape) == 2
    ]
    odd = [tensor for tensor in matrices if tensor.shape[-1] % NF4_BLOCK]
    if odd:
        notices.notice(
            f"bitsandbytes misreads nf4 on the CPU where a row is no multiple of {NF4_BLOCK} entries: {len(odd)} of "
            f"{len(matrices)} matrices, such as {odd[0].stored}, are coarser in training; int8 is not affected"
        )
