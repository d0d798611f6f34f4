"""Recipes: several operations in order, as YAML or JSON, checked against models that refuse unknown keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmsurgery.data.documents import parse_json, parse_yaml
from llmsurgery.errors import InputError, UsageError, unknown_name

JUDGE = "judge"
"""What no recipe and no manifest may name: a command is given on the command line alone."""

_NAME = r"^[A-Za-z0-9_-]+$"


class Options(BaseModel):
    """What a recipe says for all its steps, and a step for itself; the step's word counts.

    Attributes:
        seed: Seed of everything random.
        device: As `--device`.
        dtype: As `--dtype`.
        batch_size: As `--batch-size`.
        retain_model: A model that never saw the forget rows.
        models: Further models by name, for tasks that compare several.
        data: Data name -> file.
        settings: Hyperparameters by name, as `--set`; `eval.NAME` and `guard.NAME` too, also as nested mappings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    seed: int | None = Field(None, ge=0, description="seed of everything random")
    device: str | None = Field(None, description="auto, cpu, cuda or cuda:i")
    dtype: str | None = Field(None, description="auto, float32, bfloat16 or float16")
    batch_size: int | str | None = Field(None, description="rows per forward, or auto")
    retain_model: str | None = Field(None, description="a model that never saw the forget rows")
    models: dict[str, str] = Field({}, description="further models by name")
    data: dict[str, str] = Field({}, description="data name -> file")
    settings: dict[str, Any] = Field({}, description="hyperparameters by name, as --set")


class Step(Options):
    """One operation.

    Attributes:
        name: Its name; the method's by default.
        task: As the command ("unlearn").
        method: Method name.
        from_: As `--from`, of a redirection without a file of pairs.
        to: As `--to`.
        quantize: As `--quantize`.
        guard: As `--guard`.
        until: As `--until`.
        require: Gates after this step, against its own source.
        needs: Names of earlier steps that must have passed; the result of the last of them is what this step edits.
            By default the step before; an empty list: the recipe's model.
    """

    name: str | None = Field(None, pattern=_NAME, description="name of the step; the method's by default")
    task: str = Field(description="task, as the command: unlearn, redirect, ...")
    method: str = Field(description="method name; `llmsurgery methods` lists them")
    from_: str | None = Field(None, alias="from", description="the name whose meaning changes")
    to: str | None = Field(None, description="the harmless name that it is to mean")
    quantize: str | None = Field(None, description="none, int8 or nf4")
    guard: str | None = Field(None, description="none, self or a data file")
    until: str | None = Field(None, description="stop rule METRIC<=VALUE, or none")
    require: list[str] = Field([], description="gates after this step, against its own source")
    needs: list[str] | None = Field(None, description="earlier steps; the result of the last of them is edited")


class Recipe(Options):
    """A recipe.

    Attributes:
        name: Name for generated outputs.
        model: Directory, `.gguf` file or hub id; none for the embedded demo.
        out: Output directory.
        save: "full"; of a single step also "patch" or "adapter".
        undo: Keep the undo data that `revert` needs.
        link: Hard-link untouched files.
        require: Gates at the end, against the recipe's model.
        steps: The operations, in order.
    """

    name: str | None = Field(None, pattern=_NAME, description="name for generated outputs")
    model: str | None = Field(None, description="checkpoint directory, .gguf file or hub id; none: the embedded demo")
    out: str | None = Field(None, description="output directory")
    save: str = Field("full", description="full; of a single step also patch or adapter")
    undo: bool = Field(True, description="keep the undo data that revert needs")
    link: bool = Field(False, description="hard-link untouched files")
    require: list[str] = Field([], description="gates at the end, against the model that the recipe starts from")
    steps: list[Step] = Field(min_length=1, description="the operations, in order")


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes; `recipes/schema.json` is a copy."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()


def keys_of(model: type[BaseModel]) -> list[str]:
    """Return the keys of a model as a recipe spells them."""
    return [field.alias or name for name, field in model.model_fields.items()]


def read_document(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping.

    Raises:
        InputError: It is missing, malformed or something else.
    """
    try:
        text = path.read_text("utf-8")
        document = parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except OSError as error:
        raise InputError(
            f"the recipe {str(path)!r} cannot be read",
            str(error.strerror or error),
            "check the path; `llmsurgery recipes NAME -o FILE` copies a built-in recipe",
        ) from error
    except ValueError as error:
        raise InputError(f"the recipe {str(path)!r} is malformed", str(error)[:200], "correct the file") from error
    if not isinstance(document, dict):
        raise InputError(f"the recipe {str(path)!r} is no mapping", "a recipe has keys such as model and steps", "")
    return document


def check_recipe(document: Mapping[str, object], where: str) -> Recipe:
    """Check a document and give every step its name.

    Args:
        document: What was read.
        where: The file, for messages.

    Raises:
        UsageError: An unknown key (the nearest are named), a name that is taken, or a judge.
        InputError: A value of the wrong type.
    """
    _refuse_judges(document, where)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise _explained(error, where) from error
    taken: dict[str, int] = {step.name: 1 for step in recipe.steps if step.name}
    if len(taken) != sum(step.name is not None for step in recipe.steps):
        raise UsageError(f"two steps in {where} have the same name", "steps are told apart by name", "rename one")
    steps = []
    for step in recipe.steps:
        name, number = step.name or step.method, 2
        while step.name is None and name in taken:
            name, number = f"{step.method}-{number}", number + 1
        taken[name] = 1
        steps.append(step.model_copy(update={"name": name, "settings": flat(step.settings)}))
    return recipe.model_copy(update={"steps": steps, "settings": flat(recipe.settings)})


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return result


def _refuse_judges(document: object, where: str) -> None:
    if isinstance(document, Mapping):
        if JUDGE in document:
            raise UsageError(
                f"{where} names a judge",
                "a command is never read from a recipe or manifest, which others may have written",
                "take it out",
            )
        for value in document.values():
            _refuse_judges(value, where)
    elif isinstance(document, list):
        for value in document:
            _refuse_judges(value, where)


def _explained(error: ValidationError, where: str) -> UsageError | InputError:
    """Return the first error in the toolkit's own words."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    path = re.sub(r"\.(\d+)", r"[\1]", ".".join(parts)) or "the recipe"
    if first["type"] == "extra_forbidden":
        known = keys_of(Step if parts[0] == "steps" and len(parts) > 1 else Recipe)
        return unknown_name("key", path, known, f"correct {where}; `llmsurgery recipes` lists complete examples")
    if first["type"] == "missing":
        return InputError(f"{path} is missing in {where}", "every step names task and method", "add it")
    return InputError(f"{path} in {where} does not fit", str(first["msg"]).lower(), "correct the recipe")
