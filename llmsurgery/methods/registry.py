"""Find methods by name: a method registers itself by a decorator in its own file, and nowhere else."""

from __future__ import annotations

import importlib
import pkgutil

from llmsurgery import methods as package
from llmsurgery.errors import SurgeryError, UsageError, unknown_name
from llmsurgery.methods.base import Described, Method
from llmsurgery.methods.inference import Pine

INFERENCE: dict[str, Described] = {one.spec.name: one for one in (Pine(),)}
"""Procedures that change how a model is run, and none of its weights."""

_REGISTERED: dict[tuple[str, str], Method] = {}


def register(method: type) -> type:
    """Class decorator: make a method known under its spec's task and name.

    Raises:
        SurgeryError: The name is taken, which is a bug.
    """
    instance: Method = method()
    key = (instance.spec.task, instance.spec.name)
    if key in _REGISTERED:
        raise SurgeryError(f"method {key[1]!r} of {key[0]!r} is registered twice")
    _REGISTERED[key] = instance
    return method


def _import_all() -> None:
    """Import every method file; they hold specs and configs at module level and nothing heavy."""
    for task in pkgutil.iter_modules(package.__path__):
        if task.ispkg:
            folder = importlib.import_module(f"{package.__name__}.{task.name}")
            for module in pkgutil.iter_modules(folder.__path__):
                importlib.import_module(f"{folder.__name__}.{module.name}")


def all_methods() -> list[Method]:
    """Return every method, by task and name."""
    _import_all()
    return [_REGISTERED[key] for key in sorted(_REGISTERED)]


def find_described(name: str) -> Described:
    """Return a method, or a procedure of inference, by name; errors as for `find_method`."""
    return INFERENCE[name] if name in INFERENCE else find_method(name)


def find_method(name: str, task: str | None = None) -> Method:
    """Return a method by name.

    Args:
        name: Its name on the command line.
        task: Restricts the search to one task.

    Raises:
        UsageError: There is none; names the three nearest. Or it edits nothing.
    """
    if name in INFERENCE:
        raise UsageError(
            f"{name} is no method that edits a checkpoint",
            "it changes how a model is run, and none of its weights",
            f"llmsurgery methods {name} tells how to run it",
        )
    known = {method.spec.name: method for method in all_methods() if task in (None, method.spec.task)}
    if name not in known:
        fix = "llmsurgery methods lists them all"
        raise unknown_name("method" if task is None else f"method of {task}", name, known, fix)
    return known[name]
