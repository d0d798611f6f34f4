"""Roles of stored names, also of those that only a result has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from llmsurgery.arch.bundle import plain_config
from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint, TensorInfo
from llmsurgery.checkpoint.layout import Layout
from llmsurgery.errors import DamagedError, UnsupportedError

RoleOf = Callable[[str], str]


def roles_of(checkpoint: Checkpoint) -> RoleOf:
    """Return a function from stored name to role; "other" for everything where the family is not known."""
    return _roles(checkpoint.config, checkpoint.tensors)


def roles_with(role_of: RoleOf, source: Checkpoint, config: bytes | None, layout: Layout | None) -> RoleOf:
    """Return a function from stored name to role that knows the names of a result as well.

    Args:
        role_of: Knows the names of the source.
        source: The source.
        config: New content of config.json, None if it stays.
        layout: Where the tensors of the result lie, None if they are the source's.
    """
    if layout is None or not layout.files:
        return role_of
    later = _roles(source.config if config is None else json.loads(config), layout.tensors)
    return lambda name: later(name) if (found := role_of(name)) == "other" else found


def _roles(config: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> RoleOf:
    try:
        return detect(plain_config(dict(config)), tensors).role_of
    except (UnsupportedError, DamagedError):
        # Bytes can be compared and patched without knowing what they are for.
        return lambda name: "other"
