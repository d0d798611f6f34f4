"""The attack protocol: every attack is one file in `llmsurgery.evaluate.attacks`. No heavy import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from llmsurgery.evaluate.scores import PerRow
from llmsurgery.train.config import option

if TYPE_CHECKING:
    from llmsurgery.data.records import Row
    from llmsurgery.evaluate.robustness.bench import Bench

SCORES = ("extraction_strength", "accuracy", "token_prob", "rouge_l", "choice")
"""Knowledge scores K in [0, 1] of a row with an answer:

extraction_strength, accuracy and token_prob as in `forget.*`; rouge_l of the greedy answer; choice: whether the answer
(the paraphrased one where a row has it) is more probable per token than every one of `perturbed_answer`.
"""


SITES = ("block", "attention", "mlp", "middle")
"""What is read of a block: the residual after it, what attention and MLP add to it, the residual between the two."""


@dataclass(frozen=True)
class AttackConfig:
    """Settings that all attacks share; `--set attack.NAME=VALUE`."""

    seed: int = option(0, "seed of everything random in an attack", minimum=0)
    rows: int = option(200, "forget rows that are attacked at most; 0: all", minimum=0)
    retain_rows: int = option(64, "retain rows that are scored and used at most; 0: all", minimum=0)
    known: float = option(0.5, "forget rows that the source scores below this are left out", minimum=0, maximum=1)


@dataclass(frozen=True)
class AttackSpec:
    """What an attack is.

    Attributes:
        name: Name on the command line.
        summary: One sentence.
        paper: Title and arXiv id.
        needs: Data that must be given beside the forget rows ("retain").
        unit: What is scored: "rows", or "tokens" of their answers.
        only_told: Leave out what the control knows before the attack, such as the words that every answer shares.
        control_rows: Whether rows that the source does not know can stand for a control model.
        presets: Preset name -> settings that differ from the defaults.
    """

    name: str
    summary: str
    paper: str
    needs: tuple[str, ...] = ()
    unit: str = "rows"
    only_told: bool = False
    control_rows: bool = False
    presets: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """One strength or variant of an attack on one model.

    Attributes:
        label: Its name, the same for every model.
        scores: Row -> knowledge score after the attack.
        utility: Score of what is to stay, after the attack; None where an attack cannot change it.
        counts: Whether it may decide the verdict; False for diagnostics.
        detail: Further numbers.
        control: Control row -> knowledge score after the attack; none where no control rows are scored.
    """

    label: str
    scores: PerRow
    utility: float | None = None
    counts: bool = True
    detail: Mapping[str, object] = field(default_factory=dict)
    control: PerRow = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """An attack on one model.

    Attributes:
        before: Row -> knowledge score before the attack.
        points: Scores after it; those of another model have the same labels.
        utility: Score of what is to stay, before the attack.
        budget: What the attacker had: rows, steps, variants.
        weak: Why a low score after the attack proves nothing; empty if it does.
        kept: What the same attack on other models needs; never written anywhere.
        control: Control row -> knowledge score before the attack; none where no control rows are scored.
    """

    before: PerRow
    points: Sequence[Point]
    utility: float | None = None
    budget: Mapping[str, object] = field(default_factory=dict)
    weak: str = ""
    kept: object = None
    control: PerRow = field(default_factory=dict)


class Attack(Protocol):
    """An attack: check the data before any model is loaded, run on one model, compare the models."""

    spec: AttackSpec
    config_type: type

    def check(self, config: object, rows: Mapping[str, Sequence[Row]]) -> None:
        """Raise every error about settings and data."""

    def run(self, config: object, bench: Bench, source: Trial | None) -> Trial:
        """Attack one model.

        Args:
            config: Resolved settings.
            bench: The model and its data; a model changed in memory is given up with `bench.spoil()`.
            source: The trial of the model before surgery; None when that is the model on the bench.
        """

    def compare(self, edited: Trial, source: Trial, control: Trial | None) -> Mapping[str, object]:
        """Return further numbers that need more than one model."""
