"""What a debiasing is about: questions with options, about pictures or not, and texts that differ in a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmsurgery.data.contrast import Contrast
from llmsurgery.data.mcq import Choices
from llmsurgery.data.pictured import Pictured


@dataclass(frozen=True)
class Asked:
    """Questions and contrasting texts.

    Attributes:
        choices: Questions with options, or None.
        contrast: Contrasting texts, empty without any.
        pictured: Questions about pictures, or None.
    """

    choices: Choices | None = None
    contrast: Sequence[Contrast] = ()
    pictured: Pictured | None = None

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return self.choices is not None or self.pictured is not None or bool(self.contrast)

    @property
    def members(self) -> dict[str, Sequence[object]]:
        """Data name -> what its file holds, for counts."""
        questions = self.choices or self.pictured
        return {"mcq": questions.questions if questions else (), "contrast": self.contrast}


NOTHING = Asked()
"""What is asked of methods that are about other things."""
