"""Bias projection: take the directions that tell two groups apart out of what a model reads or writes.

Erasers: LEACE, "LEACE: Perfect linear concept erasure in closed form", arXiv 2306.03819 (default); SAL, "Gold Doesn't
Always Glitter", arXiv 2203.07893; INLP, "Null It Out", arXiv 2004.07667. `llmsurgery.methods.erasers` has the formulas.
No training.

The texts of --contrast are run, and the eraser P = I - left right is made from their states and the group that each is
about: the final, normed states (fold=head), or the residual stream after the last block (fold=writers).

    pool=tokens   of a pair, the states from the first token on in which the two texts differ; of a labelled text, all:
                  these are what the head reads
    pool=mean     the mean over a text, as in bias-bench

    fold=head     W_LM := W_LM P.  A LEACE eraser is affine: the constant W_LM (I - P) mean is added by the final norm's
                  bias (exact) where there is one, and left out behind an RMSNorm, as the record says. A tied head is
                  stored separately.
    fold=writers  W := P W for every matrix that writes into the residual stream of the chosen layers, biases too

What is erased is linear, and of these texts: other tokens and curved traces of the group stay, and a projection behind
the final norm changes no attention. `probe` in the record tells how well a linear classifier finds the group, before
and after; .5 is chance for two groups. `bias.stereotype_rate` is measured on held-out pairs.

Of pairs the sign is erased, for each `bias_type` one direction for each of the first tokens from the difference on and
one for all later ones (`positions` in all); of labelled texts the label. `probe` is fitted after
the erasure on one half of the texts that were learnt from and asked about the other, as an attacker would.

INLP's classifiers are linear support vector machines without intercept (squared hinge), as in the released code; its
published rounds are 10 for GPT-2 and 80 for models of BERT's size.
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
    from llmsurgery.data.asked import Asked
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.edits.kinds import Edit
    from llmsurgery.methods.erasers import Eraser

WRITERS = ("attn.o", "mlp.down", "shared.down", "expert.down")
POST_NORMS = ("norm.attn_post", "norm.mlp_post")


@dataclass(frozen=True)
class ProjectConfig:
    """Hyperparameters of the bias projection; `llmsurgery methods project` prints them with their help."""

    eraser: str = option("leace", "how the directions are found", ("leace", "sal", "inlp"))
    fold: str = option("head", "head: what the head reads; writers: what blocks write", ("head", "writers"))
    pool: str = option("tokens", "states that are looked at: of tokens, or means of texts", ("tokens", "mean"))
    positions: int = option(
        3, "leace, sal: directions for each bias_type of pairs: of the first tokens from the difference on", minimum=1
    )
    shrinkage: float = option(0.1, "leace: share of I in the covariance", minimum=0, maximum=1)
    rank: int = option(0, "sal: directions taken out at most; 0: all", minimum=0)
    rounds: int = option(10, "inlp: classifiers", minimum=1)
    writer_layers: tuple[int, ...] = option((), "fold=writers: layers whose writers change; empty: all")
    holdout: float = option(0.5, "share of --contrast that is measured and not learnt from", minimum=0, maximum=0.95)
    kl_budget: float | None = option(0.2, "gate on utility.kl, nats per token; none: no gate", minimum=0)


@register
class Project:
    """Bias projection as a method of the toolkit."""

    spec = MethodSpec(
        name="project",
        task="debias",
        summary="project the directions that tell groups apart out of what the head reads, or out of what blocks write",
        paper="LEACE: Perfect linear concept erasure in closed form, arXiv 2306.03819",
        needs=("contrast",),
        uses=("mcq", "text"),
        export="plain",
        trained=False,
        selects=True,
        demo="letters",
    )
    config_type = ProjectConfig

    def plan(self, config: ProjectConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the head, or the writers and their biases.

        Raises:
            UnsupportedError: fold=writers, and norms stand after them.
        """
        from llmsurgery.errors import UnsupportedError

        if config.fold == "head":
            from llmsurgery.methods.label_offsets import own_head

            return [own_head(structure)]
        if set(POST_NORMS) & set(structure.roles):
            raise UnsupportedError(
                f"{structure.family.name} has norms after its sublayers",
                "what a matrix writes is scaled by the norm, and the group's directions come back",
                "use --set fold=head",
            )
        chosen = structure.select([role for role in WRITERS if role in structure.roles], config.writer_layers or None)
        modules = {target.module for target in chosen if target.expert is None}
        biases = [t for t in structure.tensors if t.part == "bias" and t.module in modules]
        return [*chosen, *biases]

    def prepare(self, config: ProjectConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No rows are needed: texts are checked by `check_asked`."""

    def check_asked(self, config: ProjectConfig, encoder: Encoder, given: Asked) -> None:
        """Texts are encoded as they are read, and any text will do."""

    def edit(self, config: ProjectConfig, operation: Operation, prepared: None) -> MethodResult:
        """Read the states of both groups, make the eraser, and fold it."""
        from llmsurgery.evaluate.groups import read_groups
        from llmsurgery.methods.erasers import inlp, leace, one_hot, probe_accuracy, sal, signed_columns

        found = read_groups(
            operation.model, operation.structure, operation.encoder, operation.contrast, config.pool, config.fold
        )
        states, labels, texts = found.states, found.labels, found.records
        pairs = operation.contrast[0].is_pair
        hot, classes = one_hot([label[-1] for label in labels] if pairs else labels)
        columns = signed_columns(labels, found.offsets.tolist(), config.positions) if pairs else hot
        if config.eraser == "leace":
            eraser = leace(states, columns, config.shrinkage)
        elif config.eraser == "sal":
            eraser = sal(states, columns, config.rank)
        else:
            eraser = inlp(states, hot, config.rounds)
        if not eraser.rank:
            raise no_direction()
        first, second = texts % 2 == 0, texts % 2 == 1
        probe = {}
        if second.any() and hot[first].any(0).all():
            for when, left in (("before", states), ("after", eraser.apply(states))):
                probe[when] = probe_accuracy((left[first], hot[first]), (left[second], hot[second]))
        record: dict[str, object] = {
            "eraser": config.eraser, "rank": eraser.rank, "states": len(states), "texts": int(texts.max()) + 1,
            "classes": len(classes), "probe": probe,
        }  # fmt: skip
        if config.fold == "head":
            return _fold_head(operation, eraser, config.eraser == "leace", record)
        return _fold_writers(operation, eraser, self.plan(config, operation.structure), record)


def no_direction() -> Exception:
    """Return the error of texts whose states do not differ."""
    from llmsurgery.errors import NoEffectError

    return NoEffectError("the groups have the same states", "no direction tells them apart", "give other texts")


def _fold_head(operation: Operation, eraser: Eraser, affine: bool, record: dict[str, object]) -> MethodResult:
    """Return W_LM := W_LM P, with the affine part where the final norm can hold it."""
    import numpy as np

    from llmsurgery.edits.kinds import LowRank
    from llmsurgery.methods.label_offsets import head_tensors, is_tied, norm_row, untied

    targets = head_tensors(operation.structure)
    stored = operation.read(targets[0].stored)
    weight = stored.astype(np.float64)
    left, right = -(weight @ eraser.left), eraser.right
    constant = norm_row(operation.structure, operation) if affine else None
    if constant is not None:
        # The normed vector reads as the constant S through 1/g: the mean's share of every logit is kept.
        inverse, total = constant
        shift = weight @ (eraser.left @ (eraser.right @ eraser.mean))
        left = np.concatenate([left, shift[:, None] / total], 1)
        right = np.concatenate([right, inverse[None, :]], 0)
    record |= {"fold": "head", "affine": constant is not None}
    if affine and constant is None:
        operation.progress.notice(
            "the final norm has no bias: the linear part of the eraser is stored alone, and the mean of the erased "
            "directions goes too"
        )
    if is_tied(operation.structure):
        folded = untied(operation, (weight + left @ right).astype(np.float32), record)
        return MethodResult(folded.edits, folded.record, folded.targets)
    return MethodResult([LowRank(targets[0].stored, left, right)], record, targets)


def _fold_writers(
    operation: Operation, eraser: Eraser, targets: Sequence[RoleTensor], record: dict[str, object]
) -> MethodResult:
    """Return W := P W for every writer, b := P b for their biases."""
    import numpy as np

    from llmsurgery.edits.kinds import LowRank, Replace

    edits: list[Edit] = []
    for target in targets:
        values = operation.read(target.stored).astype(np.float64)
        if target.part == "bias":
            edits.append(Replace(target.stored, values - eraser.left @ (eraser.right @ values)))
            continue
        written = values.T if target.transposed else values
        left, right = -eraser.left, eraser.right @ written
        edits.append(LowRank(target.stored, *((right.T, left.T) if target.transposed else (left, right))))
    return MethodResult(edits, {**record, "fold": "writers"}, targets)
