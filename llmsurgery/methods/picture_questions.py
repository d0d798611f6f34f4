"""What methods for vision-language models have in common: the prior of each choice without a picture, and its fold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmsurgery.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from llmsurgery.arch.spec import Structure
    from llmsurgery.data.asked import Asked
    from llmsurgery.data.chat import Encoder
    from llmsurgery.evaluate.pictured import PicturedScores, PicturedSet
    from llmsurgery.methods.base import MethodResult, Operation
    from llmsurgery.methods.letter_questions import FoldConfig

    Numbers = npt.NDArray[np.float64]

PROJECTOR = ("projector.in", "projector.out")
"""Roles that only a model that sees pictures has."""
CONTENT_FREE = ("none", "unk", "both")
"""How a picture is removed: its tokens left out, unknown tokens in their places, or the mean of the two."""
BATCH_ROWS = 8


def require_projector(structure: Structure, name: str) -> None:
    """Refuse a model that sees no pictures.

    Raises:
        UnsupportedError: It has no projector.
    """
    if not set(PROJECTOR) & set(structure.roles):
        raise UnsupportedError(
            f"{name} is for vision-language models, and this is a text model ({structure.family.name})",
            "it has no projector from pictures to the language model, so there is no picture to remove",
            "use --method contextual or --method pride for answer letters of a text model",
        )


def kinds_of(content_free: str) -> tuple[str, ...]:
    """Return the ways to remove a picture that a setting stands for."""
    return ("none", "unk") if content_free == "both" else (content_free,)


def check_unknown(content_free: str, encoder: Encoder) -> None:
    """Refuse a way to remove pictures that needs an unknown token, where the tokenizer has none.

    Raises:
        UnsupportedError: It has none.
    """
    if "unk" in kinds_of(content_free) and encoder.tokenizer.unk_token_id is None:
        raise UnsupportedError(
            f"content_free={content_free} needs an unknown token",
            "the tokenizer has none, and it is to stand for the picture",
            "use --set content_free=none",
        )


def check_target(target: Sequence[float], given: Asked) -> None:
    """Check that a target is a distribution over the choices of the only group.

    Raises:
        UsageError: It is none.
    """
    if not target or given.pictured is None:
        return
    groups = given.pictured.groups
    if len(groups) != 1 or len(target) != len(groups[0]) or min(target) <= 0 or abs(sum(target) - 1) > 1e-3:
        raise UsageError(
            "target_prior is no distribution over the choices",
            f"the questions have {len(groups)} kinds of choices, the first {', '.join(groups[0])}; one share for each "
            "choice of the only kind is needed, with the sum 1",
            "give the shares in the order of the choices, and questions with the same choices",
        )


def group_priors(operation: Operation, content_free: str, epsilon: float) -> list[Numbers]:
    """Return the prior of the choices of each group [choices], asked without pictures.

    Per question the probabilities of the choices are normalised, for each way to remove the picture; the ways are
    added, and the mean is taken over the questions.

    Args:
        operation: What the method is given.
        content_free: One of `CONTENT_FREE`.
        epsilon: Added to each choice's share before it is divided by.
    """
    from llmsurgery.evaluate.pictured import score_pictured

    data = pictures_of(operation)
    found = [
        score_pictured(operation.model, data, BATCH_ROWS, operation.progress, kind) for kind in kinds_of(content_free)
    ]
    return [set_prior(found, data.members(number), epsilon) for number in range(len(data.groups))]


def set_prior(found: Sequence[PicturedScores], members: Sequence[int], epsilon: float) -> Numbers:
    """Return the prior of some questions with the same choices [choices]; arguments as for `group_priors`."""
    import numpy as np
    from scipy.special import softmax

    # log p of the choices, normalised over them.
    each = np.stack([softmax(np.stack([one.log_probabilities[i] for i in members]), -1) for one in found])
    prior = each.mean((0, 1)) + epsilon
    return np.asarray(prior / prior.sum())


def pictures_of(operation: Operation) -> PicturedSet:
    """Return the questions that the method learns from."""
    assert operation.pictured is not None
    return operation.pictured


def fold_choices(
    operation: Operation, deltas: Sequence[Numbers], priors: Sequence[Numbers], fold: FoldConfig
) -> MethodResult:
    """Fold the offsets of all groups into the checkpoint.

    Args:
        operation: What the method is given.
        deltas: Offsets of each group [choices], in nats, before strength and cap.
        priors: Prior of each group, for the manifest.
        fold: How they are folded.

    Raises:
        NoEffectError: All offsets are 0.
        UnsupportedError: The head takes no offset.
    """
    import numpy as np

    from llmsurgery.compute.head import read_head
    from llmsurgery.data.pictured import pictures_digest
    from llmsurgery.errors import NoEffectError
    from llmsurgery.evaluate.pictured import score_pictured
    from llmsurgery.methods.base import MethodResult
    from llmsurgery.methods.label_offsets import FoldSettings, Offsets, fold_offsets, label_offsets

    data = pictures_of(operation)
    wanted = [fold.strength * delta for delta in deltas]
    applied = [np.clip(delta, -fold.cap, fold.cap) for delta in wanted]
    if not any(delta.any() for delta in applied):
        raise NoEffectError("all offsets are 0", "no choice is usual, or strength is 0", "raise the strength")
    parts = [label_offsets(group.tokens, delta) for group, delta in zip(data.groups, applied, strict=True)]
    offsets = Offsets(
        tuple(token for part in parts for token in part.tokens), np.concatenate([part.delta for part in parts])
    )
    states = score_pictured(operation.model, data, BATCH_ROWS, operation.progress, keep_states=True).states
    assert states is not None

    def logits(tokens: Sequence[int]) -> Numbers:
        """Ask again, and return the logits of some tokens [questions, tokens]."""
        again = score_pictured(operation.model, data, BATCH_ROWS, operation.progress, keep_states=True).states
        assert again is not None
        weight = read_head(operation.model).weight[list(tokens)].float().cpu()
        return np.asarray((again @ weight.T).double().numpy())

    settings = FoldSettings(fold.route, fold.min_rho, fold.untie)
    folded = fold_offsets(operation, offsets, states, (), settings, logits)
    record: dict[str, object] = {
        "groups": [
            {
                "prior": _named(group.labels, prior),
                "offsets": _named(group.labels, delta),
                "tokens": {label: list(tokens) for label, tokens in zip(group.labels, group.tokens, strict=True)},
                "questions": len(data.members(number)),
            }
            for number, (group, prior, delta) in enumerate(zip(data.groups, priors, applied, strict=True))
        ],
        "pictures_sha256": pictures_digest(data.questions),
        "capped": any(bool((np.abs(delta) > fold.cap).any()) for delta in wanted),
        **folded.record,
    }
    return MethodResult(folded.edits, record, folded.targets)


def _named(labels: Sequence[str], values: Numbers) -> dict[str, float]:
    return {label: float(value) for label, value in zip(labels, values, strict=True)}
