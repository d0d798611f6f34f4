"""Hyperparameters: `--set name=value`, YAML and Python values into a checked config dataclass."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path

from llmsurgery.errors import InputError, UsageError, unknown_name


@dataclasses.dataclass(frozen=True)
class Setting:
    """One hyperparameter as users see it.

    Attributes:
        name: Name for `--set`.
        annotation: Its Python type.
        default: Default value.
        help: One line.
        choices: Allowed values, if few.
        minimum: Smallest allowed number.
        maximum: Largest allowed number.
        group: Name of the nested dataclass field that it lives in, or "".
        shipped: Names of what is shipped, of a text that otherwise is the path of a file; empty for other settings.
    """

    name: str
    annotation: object
    default: object
    help: str
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None
    group: str
    shipped: tuple[str, ...] = ()


def settings_of(config_type: type) -> dict[str, Setting]:
    """Return the settings of a config dataclass; the fields of nested dataclasses appear under their own names.

    Nested groups keep shared hyperparameters (`TrainingConfig`) in one place without inheritance, and users need not
    know of them.
    """
    hints = typing.get_type_hints(config_type)
    result: dict[str, Setting] = {}
    for item in dataclasses.fields(config_type):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            for name, setting in settings_of(type(default)).items():
                result[name] = dataclasses.replace(setting, default=getattr(default, name), group=item.name)
            continue
        meta = item.metadata
        result[item.name] = Setting(
            item.name,
            hints[item.name],
            default,
            meta.get("help", ""),
            meta.get("choices", ()),
            meta.get("minimum"),
            meta.get("maximum"),
            "",
            meta.get("shipped", ()),
        )
    return result


def resolve_config(
    config_type: type,
    overrides: Mapping[str, object],
    presets: Mapping[str, Mapping[str, object]] | None = None,
    prefix: str = "",
) -> typing.Any:
    """Build a config from defaults, a preset and overrides, in this order.

    Args:
        config_type: A frozen dataclass whose fields were declared with `option`.
        overrides: Setting name -> value; strings are converted to the setting's type. The name `preset` chooses one
            of the presets.
        presets: Preset name -> settings.
        prefix: What stands before the names on the command line, for messages.

    Returns:
        An instance of `config_type`.

    Raises:
        UsageError: An unknown name (the three nearest are named), a value of the wrong type or out of bounds.
    """
    known = settings_of(config_type)
    chosen = dict(overrides)
    values: dict[str, object] = {name: setting.default for name, setting in known.items()}
    if (preset := chosen.pop("preset", None)) not in (None, "toolkit"):
        if str(preset) not in (presets or {}):
            raise unknown_name("preset", str(preset), [*(presets or {}), "toolkit"])
        values.update((presets or {})[str(preset)])
    for name, value in chosen.items():
        if name not in known:
            names = [f"{prefix}{one}" for one in (*known, "preset")]
            fix = f"settings are {', '.join(names)}" if prefix else "llmsurgery methods NAME lists them all"
            raise unknown_name("hyperparameter", f"{prefix}{name}", names, fix)
        values[name] = convert(known[name], value)
    return _build(config_type, known, values)


def _build(config_type: type, known: Mapping[str, Setting], values: Mapping[str, object]) -> typing.Any:
    arguments: dict[str, object] = {}
    for item in dataclasses.fields(config_type):
        if item.name in values:
            arguments[item.name] = values[item.name]
        else:
            group = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
            inside = {name: values[name] for name, setting in known.items() if setting.group == item.name}
            arguments[item.name] = dataclasses.replace(typing.cast(typing.Any, group), **inside)
    return config_type(**arguments)


def convert(setting: Setting, value: object) -> object:
    """Convert and check one value.

    Raises:
        UsageError: The value does not fit the setting.
    """
    from pydantic import TypeAdapter, ValidationError

    annotation: typing.Any = setting.annotation
    given = value
    if typing.get_origin(annotation) is tuple and isinstance(value, str):
        # "all" is how an empty choice is printed.
        listed = "" if value == "all" and not setting.default else value.strip("[]()")
        value = [part.strip() for part in listed.split(",") if part.strip()]
    elif typing.get_origin(annotation) is tuple and isinstance(value, int):
        value = [value]
    if isinstance(annotation, types.UnionType) and value in ("none", "None", ""):
        value = None
    try:
        result: object = TypeAdapter[object](annotation).validate_python(value)
    except ValidationError as error:
        raise UsageError(
            f"{setting.name}={given} does not fit", error.errors()[0]["msg"].lower(), f"{setting.name}: {setting.help}"
        ) from error
    if setting.choices and result is not None and result not in setting.choices:
        raise unknown_name(f"value of {setting.name}", str(result), setting.choices)
    if isinstance(result, int | float) and not isinstance(result, bool):
        low, high = setting.minimum, setting.maximum
        if not math.isfinite(result):
            raise UsageError(f"{setting.name}={value} is not a finite number", setting.help, "")
        if (low is not None and result < low) or (high is not None and result > high):
            bounds = " and ".join(
                part
                for part in (
                    f"at least {low:g}" if low is not None else "",
                    f"at most {high:g}" if high is not None else "",
                )
                if part
            )
            raise UsageError(f"{setting.name}={result} is out of bounds", f"it must be {bounds}", setting.help)
    return result


def parse_assignments(assignments: Iterable[str]) -> dict[str, object]:
    """Parse `name=value` strings of `--set`; the last one of a name wins.

    Raises:
        UsageError: One has no `=`.
    """
    result: dict[str, object] = {}
    for text in assignments:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise UsageError(f"--set {text} is not an assignment", "it has no name=value form", "--set lr=1e-4")
        result[name.strip()] = value.strip()
    return result


def read_config_file(path: str | Path) -> dict[str, object]:
    """Read hyperparameters from a YAML file: one flat mapping.

    Raises:
        InputError: The file is missing or not such a mapping.
    """
    from llmsurgery.data.documents import parse_yaml

    path = Path(path)
    if not path.is_file():
        raise InputError(f"config file {path} does not exist", "no such file", "check the path of --config")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"config file {path} is not YAML", str(error), "correct the file") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"config file {path} is not a mapping", "one name: value per line is expected", "")
    return content


def as_record(config: object) -> dict[str, object]:
    """Return a config as a flat mapping of JSON values, every resolved hyperparameter by name."""
    result: dict[str, object] = {}
    for item in dataclasses.fields(typing.cast(typing.Any, config)):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            result.update(as_record(value))
        else:
            result[item.name] = list(value) if isinstance(value, tuple) else value
    return result
