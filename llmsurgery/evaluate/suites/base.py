"""What a suite is: files below one directory, their place in an evaluation, and the settings that go with them.

No heavy import: the command line and the checks before any work read this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmsurgery.data.records import Row
from llmsurgery.errors import InputError
from llmsurgery.evaluate.config import EvaluationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmsurgery.compute.progress import Progress
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.evaluate.encode import EvaluationData
    from llmsurgery.evaluate.figures import Measurement
    from llmsurgery.evaluate.intervals import Figure

ENDINGS = (".json", ".jsonl", ".parquet")
"""Endings of a suite's files, in the order in which they are looked for."""

PREFIX = "suite."
"""What stands before the settings of a suite."""


@dataclass(frozen=True)
class SuiteFile:
    """One file of a suite.

    Attributes:
        name: What it is in the evaluation; "forget", "retain", "holdout", "authors" and "facts" are measured as the
            options of these names are.
        stem: Its path below the directory, without its ending.
        required: Whether the suite cannot do without it.
        others: Other places of it, looked for in this order where the first is empty.
    """

    name: str
    stem: str
    required: bool = True
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class SuiteSpec:
    """What is known of a suite without its files.

    Attributes:
        name: Name on the command line.
        paper: Its paper.
        protocols: Protocols that it can be measured under, the published one first.
        config_type: Dataclass of its own settings, `--set suite.NAME=VALUE`.
        defaults: Evaluation settings whose default is another one under this suite.
        fixed: Evaluation settings without which its figures do not come out.
        refused: Fields of the request that do not go with it -> why.
        hint: What else to do where a file is missing.
    """

    name: str
    paper: str
    protocols: tuple[str, ...]
    config_type: type
    fixed: Mapping[str, object] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""
    defaults: Mapping[str, object] = field(default_factory=dict)


class Encoding(Protocol):
    """What a suite measures beside the figures of data options, as the tokens of one model."""

    @property
    def encoded(self) -> Sequence[Encoded]:
        """Everything that the model reads."""

    def add_to(self, data: EvaluationData) -> None:
        """Add what is measured together with the data options, on a retain model too."""

    def measure(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        measured: Measurement,
        batch_size: int,
        progress: Progress,
        before: Measurement | None = None,
    ) -> dict[str, Figure]:
        """Return the suite's own figures.

        Args:
            model: A causal language model in eval mode.
            encoder: Its encoder.
            measured: The figures that the data options and `add_to` gave; its `samples` take the numbers per row that
                another model is compared with.
            batch_size: Rows per forward.
            progress: Told of every batch.
            before: What the source gave, if there is one to compare with.
        """


class Suite(Protocol):
    """A benchmark that is measured from local files."""

    spec: SuiteSpec

    def settle(self, config: object, retained: bool) -> object:
        """Fill in settings that depend on others, and refuse those that contradict a retain model."""

    def files(self, config: object) -> Sequence[SuiteFile]:
        """Return the files that it consists of, under its settled settings."""

    def read(self, files: Mapping[str, Path]) -> Mapping[str, Sequence[object]]:
        """Read the files that are no data option."""

    def encode(
        self, encoder: Encoder, rows: Mapping[str, Sequence[object]], config: object, evaluation: EvaluationConfig
    ) -> Encoding | None:
        """Encode what was read; None if the data options are all there is."""

    def check(self, rows: Mapping[str, Sequence[Row]]) -> None:
        """Raise InputError where rows lack what the figures are made of."""

    def departures(self, rows: Mapping[str, Sequence[object]]) -> Mapping[str, object]:
        """Return what makes figures of its own rows differ from published ones."""


def find_files(spec: SuiteSpec, directory: Path, wanted: Sequence[SuiteFile]) -> dict[str, Path]:
    """Return the files of a suite that are there.

    Args:
        spec: The suite.
        directory: Where they are.
        wanted: What it consists of.

    Returns:
        Name of the data -> path.

    Raises:
        InputError: The directory or a required file is missing; names every missing one.
    """
    if not directory.is_dir():
        raise InputError(
            f"--suite-dir {directory} is no directory", "the files of a suite lie below one", "check the path"
        )
    found: dict[str, Path] = {}
    for file in wanted:
        places = [directory / f"{stem}{ending}" for stem in (file.stem, *file.others) for ending in ENDINGS]
        if (path := next((place for place in places if place.is_file()), None)) is not None:
            found[file.name] = path
    missing = [_places(file) for file in wanted if file.required and file.name not in found]
    if missing:
        raise InputError(
            f"{directory} has no {', no '.join(missing)}",
            f"suite {spec.name} needs {', '.join(file.stem for file in wanted if file.required)}, "
            f"each as {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}",
            f"put the files there as {spec.paper} publishes them" + (f", {spec.hint}" if spec.hint else ""),
        )
    return found


def _places(file: SuiteFile) -> str:
    return " or ".join((file.stem, *file.others))
