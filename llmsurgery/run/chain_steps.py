"""What the steps of a recipe ask for: requests, checked as far as they can be before the first one runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmsurgery import __version__
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.errors import UnsupportedError, UsageError, unknown_name
from llmsurgery.evaluate.gates import METRICS, ROW_NEEDS, Gate, parse_gate
from llmsurgery.methods.base import Method
from llmsurgery.methods.registry import find_method
from llmsurgery.methods.settings import as_record
from llmsurgery.run.files import data_digest, data_files, read_sets
from llmsurgery.run.fitting import parse_batch_size
from llmsurgery.run.needs import available_needs
from llmsurgery.run.pairs import NEED as PAIRS
from llmsurgery.run.pairs import requested_pairs, wants_pairs
from llmsurgery.run.recipe import Recipe, Step
from llmsurgery.run.request import Request
from llmsurgery.run.resume import source_identity
from llmsurgery.run.settings import check_untrained, split_settings

_OWN = ("seed", "device", "dtype", "batch_size", "retain_model", "quantize", "guard", "until")


@dataclass(frozen=True)
class Planned:
    """A step that is ready to run.

    Attributes:
        name: Its name.
        needs: Steps that must have passed.
        takes: The step whose result it edits; None for the recipe's model.
        method: Its method.
        request: What is asked for; its model is that of the recipe, and it has no output.
        files: Data name -> path of every file in use, those of the demo included.
        digests: Data name -> SHA-256 of what the file holds.
        resolved: Its hyperparameters, evaluation and guard settings.
    """

    name: str
    needs: tuple[str, ...]
    takes: str | None
    method: Method
    request: Request
    files: Mapping[str, Path]
    digests: Mapping[str, str] = field(default_factory=dict)
    resolved: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def plan_steps(recipe: Recipe, trust_remote_code: bool = False) -> list[Planned]:
    """Return the steps of a recipe, checked.

    Args:
        recipe: The recipe.
        trust_remote_code: Run model code that a checkpoint brings.

    Raises:
        UsageError: An unknown step, method, setting or option, or one that does not go with the method.
        UnsupportedError: A step whose result no later step could edit.
        InputError: A data file that is missing or malformed.
    """
    planned: list[Planned] = []
    for step in recipe.steps:
        names = [other.name for other in planned]
        needs = tuple(step.needs) if step.needs is not None else tuple(names[-1:])
        for need in needs:
            if need not in names:
                raise unknown_name(f"earlier step in the needs of {step.name}", need, names or ["(none)"])
        planned.append(_plan(recipe, step, needs, trust_remote_code))
    if recipe.model is None and len(demos := {one.method.spec.demo for one in planned}) > 1:
        raise UsageError(
            f"these steps have demos on different models ({', '.join(sorted(demos))})",
            "a recipe starts from one model",
            "give a model",
        )
    if len(planned) > 1 and recipe.save != "full":
        raise UsageError(
            f"save={recipe.save} does not go with several steps",
            "each edits a whole checkpoint",
            "make a patch of the result with `llmsurgery diff MODEL OUT -o PATCH`",
        )
    return planned


def _plan(recipe: Recipe, step: Step, needs: tuple[str, ...], trust_remote_code: bool) -> Planned:
    method = find_method(step.method, step.task)
    request = _request(recipe, step, method, trust_remote_code)
    takes = needs[-1] if needs else None
    if recipe.model is None and takes is not None:
        request = _with_demo(request, method)
    config, evaluation, guarding = split_settings(method, request)
    check_untrained(method, request)
    kind = method.spec.export_of(config)
    if len(recipe.steps) > 1 and kind not in ("plain", "bundle"):
        raise UnsupportedError(
            f"step {step.name} ends in a {kind}", "no other step can edit that", "choose a form that ends in weights"
        )
    files = data_files(method, request)
    if request.guard not in (None, "none", "self"):
        files["guard"] = Path(request.guard)
    available = available_needs(method, files, evaluation, request, requested_pairs(method, config, request, files))
    for text in request.require:
        parse_gate(text, available | ROW_NEEDS)
    resolved = {
        "settings": as_record(config),
        "evaluation": as_record(evaluation),
        "guard": as_record(guarding),
    }
    rows = {name: path for name, path in files.items() if name != PAIRS and not path.is_file()}
    members = read_sets(rows) if rows else {}
    digests = {name: data_digest(path, members.get(name, ())) for name, path in files.items()}
    return Planned(str(step.name), needs, takes, method, request, files, digests, resolved)


def _request(recipe: Recipe, step: Step, method: Method, trust_remote_code: bool) -> Request:
    """Return what a step asks for; what it does not say itself is the recipe's word, then the usual default."""
    options: dict[str, Any] = {}
    for name in _OWN:
        value = getattr(step, name)
        value = getattr(recipe, name, None) if value is None else value
        if value is not None:
            options[name] = value
    options["batch_size"] = parse_batch_size(options.get("batch_size"))
    shared = {name: path for name, path in recipe.data.items() if name != PAIRS or wants_pairs(method)}
    models = {**recipe.models, **step.models}
    if models:
        if "models" not in {item.name for item in dataclasses.fields(Request)}:
            raise UsageError(f"{step.method} takes no further models", "no task here compares several", "drop models")
        options["models"] = models
    if step.to is not None and step.from_ is None:
        raise UsageError(f"step {step.name} has `to` without `from`", "a name is redirected to another", "give both")
    if step.from_ is not None:
        shared.pop(PAIRS, None)
        options["concepts"] = (step.from_, step.to or "")
    return Request(
        task=step.task,
        method=step.method,
        model=recipe.model,
        data={**shared, **step.data},
        settings={**recipe.settings, **step.settings},
        require=tuple(step.require),
        link=recipe.link,
        trust_remote_code=trust_remote_code,
        **options,
    )


def _with_demo(request: Request, method: Method) -> Request:
    """Return what a later step of a recipe on the demo asks for: the demo's data and settings beside its own."""
    files = {name: str(path) for name, path in data_files(method, request).items()}
    settings = {**method.spec.demo_settings, **request.settings}
    return dataclasses.replace(request, data={**files, **request.data}, settings=settings)


def end_gates(recipe: Recipe, planned: list[Planned]) -> list[Gate]:
    """Return the gates at the end, which look at what the last step measures.

    Raises:
        UsageError: Not a gate, or one that the last step's data cannot yield.
    """
    last = planned[-1]
    config, evaluation, _ = split_settings(last.method, last.request)
    pairs = requested_pairs(last.method, config, last.request, last.files)
    available = available_needs(last.method, last.files, evaluation, last.request, pairs) | ROW_NEEDS
    gates = [parse_gate(text, available) for text in recipe.require]
    for gate in gates:
        if against_source(gate.metric) and sum(True for _ in lineage(planned)) > 1:
            raise UsageError(
                f"{gate.metric} cannot be a gate at the end",
                "every step measures it against its own source, not against the first",
                "put it into the `require` of a step",
            )
    return gates


def against_source(metric: str) -> bool:
    """Whether a metric compares a result with the model that was edited, so that steps do not add up."""
    return metric == "utility.kl" or "pairs" in METRICS[metric].needs


def lineage(planned: list[Planned]) -> list[Planned]:
    """Return the steps that lead to the result of the last one, in order."""
    by_name = {one.name: one for one in planned}
    found = [planned[-1]]
    while (takes := found[-1].takes) is not None:
        found.append(by_name[takes])
    return found[::-1]


def step_identity(step: Planned, source: Checkpoint) -> dict[str, object]:
    """Return what decides the result of a step, as JSON values; the source is the recipe's."""
    import torch
    import transformers

    asked = dataclasses.asdict(step.request)
    for name in ("data", "settings", "model", "out", "dry_run", "force", "resume", "report", "report_examples", "push"):
        del asked[name]
    identity = {
        **asked,
        **step.resolved,
        "needs": list(step.needs),
        "data": dict(step.digests),
        "source": source_identity(source),
        "threads": torch.get_num_threads(),
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    return dict(json.loads(json.dumps(identity)))
