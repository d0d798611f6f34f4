"""Recipes from files: paths relative to the file, and `key=value` overrides by dotted path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmsurgery.data.documents import parse_yaml
from llmsurgery.errors import InputError, UsageError, nearest_names, unknown_name
from llmsurgery.methods.base import Method
from llmsurgery.methods.registry import find_method
from llmsurgery.methods.settings import settings_of
from llmsurgery.run.recipe import Options, Recipe, Step, check_recipe, keys_of, read_document

MAPS = ("data", "models", "settings")
_LISTS = ("require", "needs")


@dataclass(frozen=True)
class Recorded:
    """What a manifest says of the run that is to be repeated.

    Attributes:
        config_sha256: Digest of the source's config.json; None if another model is to be used.
        tensors: Digest before, by name, of every tensor of the source that changed.
        data: Step -> data name -> digest; without what the command line replaces.
    """

    config_sha256: str | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """A recipe that is ready to run.

    Attributes:
        recipe: The recipe, with every override in it; paths are relative to the current directory.
        label: A short name for messages and generated outputs.
        recorded: What is to be repeated, where it comes from a manifest.
    """

    recipe: Recipe
    label: str
    recorded: Recorded | None = None


def load_recipe(path: Path, assignments: Sequence[str] = ()) -> Loaded:
    """Read a recipe, or a manifest as the recipe of the run that it records.

    Args:
        path: YAML or JSON file; a directory stands for the manifest in it.
        assignments: `key=value` overrides; their paths are relative to the current directory.

    Raises:
        UsageError: An unknown key or dotted path; the nearest are named.
        InputError: A file that is missing or malformed, or a manifest that cannot be replayed.
    """
    from llmsurgery.run.manifest import NAME
    from llmsurgery.run.replay import is_manifest, recipe_of, recorded_of

    path = path / NAME if path.is_dir() else path
    document = read_document(path)
    where = str(path)
    if is_manifest(document):
        given = check_recipe(recipe_of(document, where), where)
        recipe, names = override(given, assignments, where, everywhere=True)
        return Loaded(recipe, "replay", recorded_of(document, given, names))
    recipe = relative_to(check_recipe(document, where), path.parent)
    recipe, _ = override(recipe, assignments, where)
    return Loaded(recipe, recipe.name or path.stem)


def relative_to(recipe: Recipe, base: Path) -> Recipe:
    """Return a recipe whose paths, relative to its file, are relative to the current directory.

    Raises:
        UsageError: A step of an unknown method.
    """

    def place(text: str) -> str:
        # What is no file may be `name:split` of a data set.
        found = base / text
        return text if ":" in text and not found.exists() else str(found)

    def model(text: str) -> str:
        # What is no directory here may be a hub id.
        found = base / text
        return str(found) if found.exists() else text

    def setting(methods: Iterable[Method], name: str, value: object) -> object:
        known = (settings_of(method.config_type).get(name) for method in methods)
        shipped = next((one.shipped for one in known if one is not None and one.shipped), ())
        if not shipped or not isinstance(value, str) or value in shipped:
            return value
        # A bare word that is no file is left to the message that names what is shipped.
        return str(base / value) if Path(value).suffix or "/" in value or (base / value).exists() else value

    def placed(options: Recipe | Step) -> dict[str, Any]:
        kept: dict[str, Any] = {"data": {name: place(text) for name, text in options.data.items()}}
        own = options.steps if isinstance(options, Recipe) else [options]
        methods = [find_method(step.method, step.task) for step in own]
        kept["settings"] = {name: setting(methods, name, value) for name, value in options.settings.items()}
        kept["models"] = {name: model(text) for name, text in options.models.items()}
        kept["retain_model"] = None if options.retain_model is None else model(options.retain_model)
        return kept

    steps = [
        step.model_copy(
            update={
                **placed(step),
                "guard": step.guard if step.guard in (None, "none", "self") else place(str(step.guard)),
            }
        )
        for step in recipe.steps
    ]
    own = {
        "model": None if recipe.model is None else model(recipe.model),
        "out": None if recipe.out is None else str(base / recipe.out),
    }
    return recipe.model_copy(update={**placed(recipe), **own, "steps": steps})


def override(
    recipe: Recipe, assignments: Sequence[str], where: str, everywhere: bool = False
) -> tuple[Recipe, set[str]]:  # fmt: skip
    """Return a recipe with some values replaced, and the dotted paths of these.

    Args:
        recipe: The recipe.
        assignments: `path=value`; `steps.NAME.settings.lr=1e-4`.
        where: The file, for messages.
        everywhere: What is set for all steps also replaces what a step says itself: in a recipe that was made from a
            manifest every step says everything.

    Raises:
        UsageError: A path that does not exist, or a value that does not fit.
    """
    document = recipe.model_dump(by_alias=True)
    paths = set()
    for text in assignments:
        path, sign, value = text.partition("=")
        path = path.strip()
        if not sign or not path:
            raise UsageError(f"{text!r} is not an override", "it has no KEY=VALUE form", "for example model=DIR")
        _assign(document, path, _value(path, value.strip()), _known(recipe))
        if everywhere:
            _clear_steps(document, path)
        paths.add(path)
    try:
        return check_recipe(document, where), paths
    except InputError as error:
        raise UsageError(error.what, error.why, "correct the KEY=VALUE on the command line") from error


def _value(path: str, text: str) -> object:
    """Return the value of an override: a list or mapping in YAML, else text that the models convert."""
    if text[:1] in ("[", "{"):
        try:
            return parse_yaml(text)
        except ValueError as error:
            raise UsageError(f"the value of {path} is not YAML", str(error), "") from error
    if text == "null":
        return None
    return [text] if path.rpartition(".")[2] in _LISTS else text


def data_names() -> list[str]:
    """Return every name of data that a method or a figure takes."""
    from llmsurgery.methods.registry import all_methods
    from llmsurgery.run.files import DATA_NAMES
    from llmsurgery.run.pairs import NEED

    own = {name for method in all_methods() for name in (*method.spec.needs, *method.spec.uses)}
    return sorted({*DATA_NAMES, NEED, *own})


def _known(recipe: Recipe) -> list[str]:
    """Return every dotted path that can be set, settings left out but for those that are there."""
    data = data_names()

    def of(options: Recipe | Step, prefix: str) -> list[str]:
        keys = [key for key in keys_of(type(options)) if key not in ("steps", *MAPS)]
        keys = [key for key in keys if not (prefix and key == "name")]
        keys += [f"data.{name}" for name in {*data, *options.data}]
        keys += [f"models.{name}" for name in options.models] + [f"settings.{name}" for name in options.settings]
        return [prefix + key for key in keys]

    steps = [path for step in recipe.steps for path in of(step, f"steps.{step.name}.")]
    return [*of(recipe, ""), *steps]


def _assign(document: dict[str, Any], path: str, value: object, known: Sequence[str]) -> None:
    place, rest = document, path
    if rest.startswith("steps."):
        name, _, rest = rest.removeprefix("steps.").partition(".")
        steps = {step["name"]: step for step in document["steps"]}
        if name not in steps:
            raise unknown_name("step", name, steps, f"{path} names no step of the recipe")
        place = steps[name]
    head, dot, inner = rest.partition(".")
    if head in ("settings", "models") and dot and inner:
        # Whether a method has the setting, and the task the model, is checked with the step.
        place[head] = {**place[head], inner: value}
    elif path in known and head == "data":
        place["data"] = {**place["data"], inner: value}
    elif path in known:
        place[head] = value
    else:
        near = nearest_names(path, known) or list(known)[:3]
        raise UsageError(
            f"unknown path {path!r}", f"nearest: {', '.join(near)}", "a path is KEY, data.NAME or steps.NAME.KEY"
        )


def _clear_steps(document: dict[str, Any], path: str) -> None:
    head, _, inner = path.partition(".")
    for step in document["steps"]:
        if head in MAPS:
            step[head] = {name: value for name, value in step[head].items() if name != inner}
        elif head in Options.model_fields:
            step[head] = None
