"""llmsurgery: change a trained language model after the fact, and prove it.

The public names load their modules on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmsurgery.api import (
        apply,
        audit,
        compare,
        debias,
        diff,
        evaluate_checkpoints,
        inspect_checkpoint,
        lens,
        linearity,
        neurons,
        prune,
        recover_alignment,
        redirect,
        remove_layernorm,
        revert,
        run_recipe,
        stack,
        trace,
        unlearn,
        verify,
    )
    from llmsurgery.errors import SurgeryError

__version__ = "0.1.0"

__all__ = [
    "SurgeryError",
    "__version__",
    "apply",
    "audit",
    "compare",
    "debias",
    "diff",
    "evaluate_checkpoints",
    "inspect_checkpoint",
    "lens",
    "linearity",
    "neurons",
    "prune",
    "recover_alignment",
    "redirect",
    "remove_layernorm",
    "revert",
    "run_recipe",
    "stack",
    "trace",
    "unlearn",
    "verify",
]

_HOMES = {name: "llmsurgery.api" for name in __all__ if name != "__version__"} | {"SurgeryError": "llmsurgery.errors"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
