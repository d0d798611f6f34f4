"""ORT (arXiv 2506.07795): does forgetting depend on the form of the question? Four forms, for forget and retain.

Files below the directory, `.json`, `.jsonl` or `.parquet`, for `forget` and for `retain`; the first that is there:

    form     what is asked                  files
    qa       a question                     forget_qa, forget_level2, forget
    cloze    a sentence with a blank        forget_cloze, forget_fb, forget_level1, forget
    mcq      the letter of a choice         forget_mcq, forget_mcp, forget, forget_qa, forget_level2
    spelled  the answer letter by letter    forget_spelled, forget_subtoken, forget, forget_qa, forget_level2

`retain_...` likewise, or `neighbor_level1` and `_level2`: a target's folder of RWKU, whose data ORT restructures, has
qa, cloze and spelled. Every record has `question` (or `query`) and `answer`; `llmsurgery.data.question_forms` says how
one file `forget` holds several forms (`form`, or as its keys say), and how forms are made of plain questions: spelled
answers always, multiple choice where `perturbed_answer` lists wrong ones. Records with `choices` have as `answer` the
letter, the number from 0 or the text of the right one; without `choices`, the question lists them and `answer` is the
letter. The published data is one folder per person, each for a model of its own; so is this suite.

The prompt is the user's turn below, through the chat template with its generation prompt (as it stands where there is
no template), then "Answer:". What follows is " {answer}", for mcq " {letter}":

    qa       Please briefly answer the following question.\\nQuestion: {q}\\n
    cloze    Please complete the blank in the following question.\\nQuestion: {q}\\n
    mcq      Please answer the following multiple choice question. Just provide the letter of the correct answer.\\n
             Question: {q}\\n
    spelled  Write the answer character by character, each on a new line.\\n, then the text of cloze if {q} has a blank
             and of qa otherwise; after "Answer:\\n" follows the answer without blanks, one character a line

Figures, `ort.forget_qa` and so on (lower is better) and `ort.retain_qa` and so on (unchanged is better): per row
exp(mean of log p over the tokens of the answer), no end token, and the mean over rows. It is a geometric mean per
token, which summaries call a joint probability. With `--source`, `ort.form_gap` = largest - smallest relative drop
(p_before - p_after) / p_before over the forms of the forget rows: 0 if forgetting does not depend on the form.

Settings: `suite.forms=qa,cloze` for some of the forms, and the gap is over these; `suite.spelling=example` shows one
spelled answer (Tokyo) in place of the instruction, as for all models but Llama in the paper; `suite.direct=true` puts
a line before every prompt that asks for the answer alone, as for Mistral. The wording of these two is this project's.
A prompt longer than the model takes loses its first tokens, and is counted. No message, log or report holds a question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from llmsurgery.data.question_forms import FORMS, LEVELS, SYNONYMS, FormRow, read_form
from llmsurgery.data.records import Row
from llmsurgery.errors import UsageError, unknown_name
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.suites.base import Encoding, SuiteFile, SuiteSpec
from llmsurgery.train.config import option

if TYPE_CHECKING:
    from llmsurgery.data.chat import Encoder

SIDES = ("forget", "retain")

CELLS = tuple(f"{side}_{form}" for side in SIDES for form in FORMS)
"""The eight figures."""

_MADE = ("mcq", "spelled")
"""Forms that can be made of questions."""

_ALONE = "its figures are those of the questions alone"


@dataclass(frozen=True)
class OrtConfig:
    """Settings of the suite."""

    forms: tuple[str, ...] = option(FORMS, "which of qa, cloze, mcq and spelled are asked; the gap is over these")
    spelling: str = option(
        "letters", "how spelled answers are asked for: an instruction, or one example", ("letters", "example")
    )
    direct: bool = option(False, "a first line asks for the answer without explanation")


class Ort:
    """Four forms of the same questions."""

    spec = SuiteSpec(
        "ort",
        "arXiv 2506.07795",
        ("own",),
        OrtConfig,
        refused={"retain_model": _ALONE, "retain_log": _ALONE, "log": "a log holds rows of TOFU", "attacks": _ALONE},
        hint="or leave forms out, --set suite.forms=qa,cloze",
    )

    def settle(self, config: object, retained: bool) -> object:
        """Refuse unknown forms, and none."""
        chosen = cast(OrtConfig, config)
        forms = [SYNONYMS.get(name, name) for name in chosen.forms]
        for name in forms:
            if name not in FORMS:
                raise unknown_name("form of ort", name, FORMS)
        if not forms:
            raise UsageError("suite.forms names no form", "nothing is asked", f"choose of {', '.join(FORMS)}")
        return OrtConfig(tuple(name for name in FORMS if name in forms), chosen.spelling, chosen.direct)

    def files(self, config: object) -> Sequence[SuiteFile]:
        """Return the files of the chosen forms, for both sides."""
        return [
            SuiteFile(f"{side}_{form}", f"{side}_{form}", others=_others(side, form))
            for side in SIDES
            for form in cast(OrtConfig, config).forms
        ]

    def departures(self, rows: Mapping[str, Sequence[object]]) -> Mapping[str, object]:
        """Return how many multiple-choice questions were put together here."""
        made = sum(cast(FormRow, row).made for members in rows.values() for row in members)
        return {"made_choices": made} if made else {}

    def check(self, rows: Mapping[str, Sequence[Row]]) -> None:
        """Accept any other rows: none belong to the suite."""

    def read(self, files: Mapping[str, Path]) -> Mapping[str, Sequence[object]]:
        """Read the questions of every cell."""
        return {name: read_form(path, name.partition("_")[2]) for name, path in files.items()}

    def encode(
        self, encoder: Encoder, rows: Mapping[str, Sequence[object]], config: object, evaluation: EvaluationConfig
    ) -> Encoding:
        """Return prompts and answers as tokens."""
        from llmsurgery.evaluate.suites.ort_figures import encode_ort

        own = {name: [cast(FormRow, row) for row in members] for name, members in rows.items()}
        return encode_ort(encoder, own, cast(OrtConfig, config), evaluation)


def _others(side: str, form: str) -> tuple[str, ...]:
    """Return the other places of a cell: names of the paper and of RWKU, a file of all forms, and questions."""
    names = [f"{side}_{name}" for name, known in SYNONYMS.items() if known == form]
    questions = [f"{side}_qa", *_levels(side, "qa")] if form in _MADE else []
    return (*names, *_levels(side, form), side, *questions)


def _levels(side: str, form: str) -> list[str]:
    first = "neighbor" if side == "retain" else side
    return [f"{first}_{level}" for level, known in LEVELS.items() if known == form]
