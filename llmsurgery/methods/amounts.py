"""The options of `prune` that say how much: each is a hyperparameter of the methods that have it. No heavy import."""

from __future__ import annotations

from llmsurgery.errors import UsageError
from llmsurgery.methods.registry import all_methods, find_method
from llmsurgery.methods.settings import settings_of

OPTIONS = {
    "sparsity": "--sparsity",
    "pattern": "--pattern",
    "of": "--of",
    "hidden": "--hidden",
    "keep_layers": "--layers",
}
"""Hyperparameter -> the option that sets it."""


def amount_settings(method: str, **given: object) -> dict[str, object]:
    """Return the options that were given as hyperparameters of a method.

    Args:
        method: Its name.
        **given: Hyperparameter -> value, None where the option was not given.

    Raises:
        UsageError: The method has no such hyperparameter.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    known = settings_of(find_method(method, "prune").config_type)
    for name in chosen:
        if name not in known:
            others = [
                other.spec.name
                for other in all_methods()
                if other.spec.task == "prune" and name in settings_of(other.config_type)
            ]
            raise UsageError(
                f"{method} has no {OPTIONS[name]}",
                f"methods that have it: {', '.join(others) or 'none'}",
                f"drop {OPTIONS[name]}, or choose another method",
            )
    return chosen
