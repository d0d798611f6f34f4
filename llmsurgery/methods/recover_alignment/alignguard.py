"""alignguard: take out of a LoRA adapter what moves its base where the loss of safe answers is sensitive.

Paper: AlignGuard-LoRA, arXiv 2508.02079. It splits the update D = s B A of a matrix into D_A = P D, in the subspace
where the loss of safe answers is sensitive (Fisher information), and the rest, and punishes the first in training. Here
the same split is made afterwards and the first part removed; nothing trains. The variant, which is this project's own,
keeps the rank and the format of the adapter:

    g_i       gradient of the mean negative log-likelihood of safe answer i, at the base's weights  [outputs, inputs]
    side=out  U the leading eigenvectors of (1/m) sum_i g_i g_i^T,  B <- B - kappa U U^T B
    side=in   V the leading eigenvectors of (1/m) sum_i g_i^T g_i,  A <- A - kappa A V V^T

A row of --harmful with a completion gives that as the safe answer. For prompts alone the base answers itself, and what
is no refusal is left out: another matrix, which the record tells by counts. kappa=none takes the repair that removes
least and brings the refusals to within 5 points of the base's, losing no more of the task than `drop`: kappa is one of
.25, .5, .75 and 1, and with directions=0 their number one of 1, 2, 4, 8 and 16. It is chosen on the prompts whose
gradients were taken; a rate on others says more.

For every matrix the record has `share`, |D_A|^2 / |D|^2, beside `chance`, d over the width of the side, which any d
directions would have on average, and D^T F D, how sensitive the loss is to the update: of the adapter, of the repaired
one and of what was removed.

What differs from the paper, whose text is not known here: no training objective, no collision terms (with orthogonal
parts one of them is zero, and with a diagonal Fisher information both), an eigenbasis per matrix and side in place of
one of all weights. The public sources of the method disagree with each other on what the sensitive part is.

MODEL is the adapter, --aligned its base. The result is an adapter that loads on it; form=merged writes the base with
the repaired adapter in its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.edits.kinds import Edit


@dataclass(frozen=True)
class AlignguardConfig:
    """Hyperparameters of alignguard; `llmsurgery methods alignguard` prints them with their help."""

    form: str = option("adapter", "an adapter, or its base with the repaired adapter merged", ("adapter", "merged"))
    side: str = option("out", "side of the matrices whose directions are removed: B changes, or A", ("out", "in"))
    kappa: float | None = option(None, "share of the sensitive part that is removed; none: tried", minimum=0, maximum=1)
    directions: int = option(8, "directions per matrix; 0: tried", minimum=0)
    rows: int = option(256, "safe answers whose gradients are taken at most", minimum=1)
    answer_tokens: int = option(64, "longest answer of the base to a prompt without one", minimum=1)
    drop: float = option(0.05, "share of the task score that may be lost where kappa is tried", minimum=0, maximum=1)
    scorer: str = option("probability", "score of the task", ("probability", "exact", "rouge_l"))
    controls: bool = option(True, "measure a random restoration and an interpolation of the same size")


@dataclass(frozen=True)
class Safe:
    """Rows of --harmful: those with a safe answer, encoded, and those without."""

    answered: Sequence[Encoded]
    asked: Sequence[Row]


@register
class Alignguard:
    """alignguard as a method of the toolkit."""

    spec = MethodSpec(
        name="alignguard",
        task="recover-alignment",
        summary="remove from a LoRA adapter what moves the base where safe answers are sensitive",
        paper="AlignGuard-LoRA: Alignment-Preserving Fine-Tuning via Fisher-Guided Decomposition and "
        "Riemannian-Geodesic Collision Regularization, arXiv 2508.02079",
        needs=("harmful",),
        uses=("task",),
        export="adapter",
        forms={"adapter": "adapter", "merged": "plain"},
        trained=False,
        selects=True,
        models=("aligned",),
        adapter=True,
        demo_settings={"side": "in", "directions": 24, "drop": 0.1},
        demo="refuse",
    )
    config_type = AlignguardConfig

    def plan(self, config: AlignguardConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices that an adapter may be on; those of the given one are chosen of them."""
        return structure.select(["linear"])

    def prepare(self, config: AlignguardConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> Safe:
        """Encode the safe answers that are given."""
        rows = data["harmful"][: config.rows]
        return Safe([encoder.encode(row) for row in rows if row.answer], [row for row in rows if not row.answer])

    def edit(self, config: AlignguardConfig, operation: Operation, prepared: Safe) -> MethodResult:
        """Find the sensitive directions, choose how much of them goes, and return the repaired adapter."""
        from llmsurgery.edits.kinds import File, LowRank
        from llmsurgery.errors import NoEffectError
        from llmsurgery.methods.adapter_repair import choose, find_removal, removal_figures
        from llmsurgery.methods.recovering import controls, removed_share

        removal, rows, record = find_removal(config, operation, prepared.answered, prepared.asked)
        choice, tried = choose(config, operation, removal)
        files = removal.files(choice)
        if files is None:
            raise NoEffectError(
                "no stored entry of the adapter changed",
                f"kappa={choice.kappa:g} takes nothing out of it",
                "raise kappa or directions",
            )
        record |= {"kappa": choice.kappa, "directions": choice.directions, "tried": tried}
        record |= removal_figures(operation, removal, choice, rows)
        targets = removal.targets
        share, entries = removed_share(operation, lambda t: removal.merged(operation, t, choice), targets)
        record["controls"] = controls(operation, targets, share, entries, config.controls, dense=True)
        edits: list[Edit] = [LowRank(target.stored, *removal.low_rank(target, choice)) for target in targets]
        if config.form == "adapter":
            edits += [File(name, content) for name, content in files.items()]
        return MethodResult(edits, record, targets)
