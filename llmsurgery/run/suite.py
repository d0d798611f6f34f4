"""`eval --suite`: a directory of a published benchmark becomes data and settings of an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmsurgery.checkpoint import file_digest
from llmsurgery.data.records import Row
from llmsurgery.errors import UsageError, unknown_name
from llmsurgery.evaluate.config import EvaluationConfig, settle
from llmsurgery.evaluate.suites.base import PREFIX, Encoding, Suite, find_files
from llmsurgery.evaluate.suites.registry import find_suite
from llmsurgery.methods.settings import as_record, resolve_config
from llmsurgery.run.files import SETS
from llmsurgery.run.request import EvaluationRequest

if TYPE_CHECKING:
    from llmsurgery.data.chat import Encoder
    from llmsurgery.evaluate.encode import EvaluationData

_FREE = {"protocol", "batch_size", "text_rows", "text_tokens"}
"""Evaluation settings that are no departure from a suite: they are its choice, or touch none of its figures."""


@dataclass(frozen=True)
class SuitePlan:
    """A suite with its resolved settings.

    Attributes:
        suite: The suite.
        config: Its settings.
        directory: Where its files are.
        files: Name of the data -> path, of the files that are no data option.
        rows: What they hold.
    """

    suite: Suite
    config: object
    directory: str
    files: Mapping[str, Path]
    rows: Mapping[str, Sequence[object]]

    @property
    def needs(self) -> set[str]:
        """What gates may refer to because of the suite."""
        name = self.suite.spec.name
        return {f"suite:{name}", *(f"suite:{name}:{part}" for part in self.files)}

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every file."""
        return {name: file_digest(path) for name, path in self.files.items()}

    def encode(self, encoder: Encoder, data: EvaluationData, evaluation: EvaluationConfig) -> Encoding | None:
        """Encode the suite's own rows, and add to the data options' what is measured with them."""
        encoding = self.suite.encode(encoder, self.rows, self.config, evaluation)
        if encoding is not None:
            encoding.add_to(data)
        return encoding

    def check(self, rows: Mapping[str, Sequence[Row]], evaluation: EvaluationConfig) -> None:
        """Refuse rows and settings from which the suite's figures do not come out.

        Raises:
            InputError: Rows lack something.
            UsageError: A setting switches something off.
        """
        spec = self.suite.spec
        for name, value in spec.fixed.items():
            if (given := getattr(evaluation, name)) != value:
                raise UsageError(
                    f"{name}={str(given).lower()} does not go with --suite {spec.name}",
                    "some of its figures would not come out",
                    f"drop --set {name}",
                )
        self.suite.check(rows)

    def departures(self, evaluation: EvaluationConfig) -> dict[str, object]:
        """Return the settings and data under which figures are not those of the published protocol."""
        published = settle(
            resolve_config(EvaluationConfig, {**self.suite.spec.defaults, "protocol": evaluation.protocol})
        )
        given, usual = (dataclasses.asdict(config) for config in (evaluation, published))
        changed = {name: value for name, value in given.items() if name not in _FREE and value != usual[name]}
        return {**changed, **self.suite.departures(self.rows)}

    def record(self, evaluation: EvaluationConfig) -> dict[str, object]:
        """Return what the document says of the suite."""
        return {
            "name": self.suite.spec.name,
            "paper": self.suite.spec.paper,
            "dir": self.directory,
            "protocol": evaluation.protocol,
            "settings": as_record(self.config),
            "departures": self.departures(evaluation),
        }


def plan_suite(request: EvaluationRequest) -> tuple[EvaluationRequest, SuitePlan | None]:
    """Turn the files of a suite into the data and settings of a request.

    Returns:
        The request that stands for the suite, and the plan; the request as it is, and None, without a suite.

    Raises:
        UsageError: An unknown suite or setting, or an option that contradicts the suite.
        InputError: Files are missing.
    """
    own = {name.removeprefix(PREFIX): value for name, value in request.settings.items() if name.startswith(PREFIX)}
    if request.suite is None:
        if request.suite_dir is not None or own:
            given = "--suite-dir" if request.suite_dir is not None else f"{PREFIX}{next(iter(own))}"
            raise UsageError(f"{given} is given without a suite", "it would do nothing", "give --suite NAME")
        return request, None
    suite = find_suite(request.suite)
    spec = suite.spec
    if request.suite_dir is None:
        raise UsageError(f"--suite {spec.name} needs --suite-dir", "its files are local", "give --suite-dir DIR")
    for name in request.data:
        if name != "text":
            raise UsageError(
                f"--{name} does not go with --suite {spec.name}",
                "the suite brings its own rows",
                f"drop --{name}, or give every data option without --suite",
            )
    for name, why in spec.refused.items():
        if getattr(request, name):
            option = f"--{name.replace('_', '-').removesuffix('s')}"
            raise UsageError(f"{option} does not go with --suite {spec.name}", why, f"drop {option}")
    config = suite.settle(resolve_config(spec.config_type, own, prefix=PREFIX), request.retain_model is not None)
    chosen = {name: value for name, value in request.settings.items() if not name.startswith(PREFIX)}
    settings = {**spec.defaults, **chosen}
    if (protocol := str(settings.setdefault("protocol", spec.protocols[0]))) not in spec.protocols:
        allowed = f"--suite {spec.name} goes with protocol={' or '.join(spec.protocols)}"
        raise unknown_name(f"protocol of suite {spec.name}", protocol, spec.protocols, allowed)
    found = find_files(spec, Path(request.suite_dir), suite.files(config))
    data = {**request.data, **{name: str(path) for name, path in found.items() if name in SETS}}
    files = {name: path for name, path in found.items() if name not in SETS}
    plan = SuitePlan(suite, config, request.suite_dir, files, suite.read(files))
    return dataclasses.replace(request, data=data, settings=settings), plan
