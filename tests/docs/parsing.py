"""Check a command line as far as that goes without running it: options, names of methods, settings, gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from llmsurgery.cli.app import app
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.gates import NEEDS, parse_gate
from llmsurgery.evaluate.suites.registry import find_suite
from llmsurgery.methods.registry import all_methods, find_method
from llmsurgery.methods.settings import parse_assignments, resolve_config
from llmsurgery.run.attack import plan_attacks
from llmsurgery.run.builtin import find_recipe
from llmsurgery.run.compare import read_recipes
from llmsurgery.run.overrides import load_recipe
from llmsurgery.run.request import EvaluationRequest, Request
from llmsurgery.run.search import SearchConfig
from llmsurgery.run.settings import split_settings

GROUP: Any = typer.main.get_command(app)
TASKS = {method.spec.task for method in all_methods()}


def check(words: tuple[str, ...]) -> None:
    """Check one command line.

    Args:
        words: What follows `llmsurgery`.

    Raises:
        SurgeryError: A method, hyperparameter, setting, gate, suite, attack or recipe that does not exist.
        typer.exceptions.TyperException: A command or an option that does not exist, or a missing one.
    """
    context = GROUP.make_context("llmsurgery", list(words))
    name, command, rest = GROUP.resolve_command(context, list(words))
    while hasattr(command, "resolve_command"):
        context = command.make_context(name, list(rest), parent=context)
        name, command, rest = command.resolve_command(context, list(rest))
    given = command.make_context(name, rest, parent=context).params
    for gate in (*(given.get("require") or ()), *_stop_rule(given)):
        parse_gate(gate, set(NEEDS))
    settings = parse_assignments(given.get("assignments") or ()) if name != "run" else {}
    if name in TASKS:
        _check_operation(name, given, settings)
    elif name == "eval":
        _check_evaluation(given, settings)
    elif name == "compare":
        for recipe in read_recipes([text for text in given["recipes"] if not text.endswith(".yaml")]):
            _resolve("unlearn", recipe.method, recipe.settings)
        _check_attacks(given, settings)
    elif name == "methods" and given["name"]:
        find_method(given["name"])
    elif name == "run" and not given["recipe"].isupper() and "." not in given["recipe"]:
        load_recipe(find_recipe(given["recipe"]), given["assignments"] or ())


def options_of(name: str | None) -> set[str]:
    """Return the options of a command and of the commands below it, or of all of them."""
    found, left = set(), list(GROUP.commands.values() if name is None else [GROUP.commands[name]])
    while left:
        command = left.pop()
        left += getattr(command, "commands", {}).values()
        found |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return found | {"--help", "-h", "--version"}


def _stop_rule(given: Mapping[str, Any]) -> list[str]:
    return [rule] if (rule := given.get("until")) not in (None, "none") else []


def _check_operation(task: str, given: Mapping[str, Any], settings: Mapping[str, object]) -> None:
    if given["method"] == "auto":
        known = {name: value for name, value in settings.items() if name in SearchConfig.__dataclass_fields__}
        resolve_config(SearchConfig, known)
        return
    _resolve(task, given["method"], settings)


def _resolve(task: str, method: str, settings: Mapping[str, object]) -> None:
    found = find_method(method, task)
    split_settings(found, Request(task=task, method=method, model="MODEL", settings=settings))


def _check_evaluation(given: Mapping[str, Any], settings: Mapping[str, object]) -> None:
    own = {name: value for name, value in settings.items() if name.startswith("suite.")}
    rest = {name: value for name, value in settings.items() if not name.startswith(("suite.", "attack."))}
    if given["suite"]:
        spec = find_suite(given["suite"]).spec
        resolve_config(spec.config_type, {name.removeprefix("suite."): value for name, value in own.items()})
    else:
        assert not own, "settings of a suite without --suite"
    resolve_config(EvaluationConfig, rest)
    _check_attacks(given, settings)


def _check_attacks(given: Mapping[str, Any], settings: Mapping[str, object]) -> None:
    names = [name for names in given["attacks"] or () for name in names.split(",")]
    chosen = {name: value for name, value in settings.items() if name.startswith("attack.")}
    plan_attacks(EvaluationRequest(("OUT",), {"forget": ""}, source="", attacks=tuple(names), settings=chosen))
