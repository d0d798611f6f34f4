"""Settings of a run, and the options that depend on its method: guard, stop rule, quantised training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from llmsurgery.arch.spec import Structure
from llmsurgery.errors import UsageError
from llmsurgery.evaluate.config import EvaluationConfig, settle
from llmsurgery.evaluate.gates import Gate, parse_gate
from llmsurgery.methods.base import Method
from llmsurgery.methods.settings import resolve_config
from llmsurgery.run.request import Request
from llmsurgery.train.config import GuardConfig, TrainingConfig, suitable_lr


def split_settings(method: Method, request: Request) -> tuple[object, EvaluationConfig, GuardConfig]:
    """Resolve the method's hyperparameters and, by their prefixes `eval.` and `guard.`, the other settings."""
    own, shared, guarding = _by_prefix(request.settings)
    if isinstance(request.batch_size, int):
        shared.setdefault("batch_size", request.batch_size)
    if request.model is None:
        own = {**method.spec.demo_settings, **own}
    config = resolve_config(method.config_type, own, method.spec.presets)
    evaluation = settle(resolve_config(EvaluationConfig, shared))
    if method.spec.models and evaluation.scorer is None:
        evaluation = dataclasses.replace(evaluation, scorer=str(getattr(config, "scorer", "probability")))
    guard: GuardConfig = resolve_config(GuardConfig, guarding)
    return config, evaluation, guard


def _by_prefix(settings: Mapping[str, object]) -> list[dict[str, object]]:
    result: list[dict[str, object]] = [{}, {}, {}]
    for name, value in settings.items():
        prefix, dot, rest = name.partition(".")
        place = {"eval": 1, "guard": 2}.get(prefix, 0) if dot else 0
        result[place][rest if place else name] = value
    return result


def settle_model(method: Method, config: object, structure: Structure, guarded: bool) -> object:
    """Return a config with what depends on the model filled in: the step size, and what the method settles itself."""
    if method.spec.trains(config):
        config = settle_lr(config, structure, guarded, method.spec.lr_scale)
    settle_own = getattr(method, "settle", None)
    return config if settle_own is None else settle_own(config, structure)


def settle_lr(config: object, structure: Structure, guarded: bool, scale: float = 1.0) -> object:
    """Fill in the step size of a trained method that was left to the toolkit, so that the manifest names it."""
    training = getattr(config, "training", None)
    if not isinstance(training, TrainingConfig) or training.lr is not None:
        return config
    width = next(tensor.shape[-1] for tensor in structure.tensors if tensor.role == "embed")
    lr = float(f"{scale * suitable_lr(width, training.train, guarded):.2g}")
    settled = dataclasses.replace(training, lr=lr)
    return dataclasses.replace(cast(Any, config), training=settled)


def with_budget(request: Request, config: object) -> Request:
    """Return a request with the gate that a method's own `kl_budget` stands for."""
    budget = getattr(config, "kl_budget", None)
    gate = None if budget is None else f"utility.kl<={budget:g}"
    if gate is None or gate in request.require:
        return request
    return dataclasses.replace(request, require=(*request.require, gate))


def guard_source(method: Method, request: Request) -> str:
    """Return "self", "none" or the file that the guard is made from.

    Raises:
        UsageError: A guard was asked for of a method that does not train, or makes nothing forgotten.
    """
    if (why := unwatched(method)) is not None:
        if request.guard not in (None, "none"):
            raise UsageError(f"{method.spec.name} has no --guard", why, "drop --guard")
        return "none"
    # A preset reproduces a paper, which knows no guard.
    paper = request.settings.get("preset") not in (None, "toolkit")
    return request.guard or ("none" if paper else "self")


def unwatched(method: Method) -> str | None:
    """Return why a method has neither guard nor stop rule, None if it has."""
    if not (method.spec.trained or method.spec.recovers):
        return "it does not train"
    return None if "forget" in method.spec.needs else "nothing is to be forgotten"


def check_untrained(method: Method, request: Request) -> None:
    """Refuse options that only training has, of a method that does not train.

    Raises:
        UsageError: One was given.
    """
    guard_source(method, request)
    # Of a method that trains, `none` only says what holds anyway.
    allowed = (None, "none") if method.spec.trained or method.spec.recovers else (None,)
    if (why := unwatched(method)) is not None and request.until not in allowed:
        raise UsageError(f"{method.spec.name} has no --until", why, "drop --until")
    if not method.spec.trained and request.quantize != "none":
        why = "it scores the weights themselves" if method.spec.recovers else "it does not train"
        raise UsageError(f"{method.spec.name} has no --quantize", why, "drop --quantize")


def stop_rule(method: Method, config: object, request: Request, available: set[str]) -> Gate | None:
    """Return the stop rule of a run: the one that is asked for, else the method's own; None for no rule.

    Args:
        method: The method.
        config: Its resolved config.
        request: The request.
        available: Needs of metrics that are met.

    Raises:
        UsageError: It is no rule, one that training cannot watch, or nothing is trained.
    """
    check_untrained(method, request)
    if request.until == "none":
        return None
    if (kind := method.spec.export_of(config)) != "plain":
        if request.until is not None:
            raise UsageError(
                f"a {kind} of {method.spec.name} has no --until", "the model itself is not trained", "drop --until"
            )
        return None
    paper = request.settings.get("preset") not in (None, "toolkit")
    text = request.until or (None if paper else method.spec.until)
    if text is None:
        return None
    rule = parse_gate(text, available)
    if rule.metric not in {"forget.token_prob", "forget.prob"}:
        raise UsageError(
            f"--until cannot watch {rule.metric}",
            "during training only forget.token_prob and forget.prob are measured",
            "use one of these, or --require for a gate at the end",
        )
    return rule
