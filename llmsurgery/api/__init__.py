"""The toolkit as functions: one per task, the same things as the command line."""

from __future__ import annotations

from llmsurgery.api.chains import compare, recipes, run_recipe
from llmsurgery.api.looking import audit, inspect_checkpoint, lens, linearity, neurons, trace
from llmsurgery.api.measuring import evaluate_checkpoints, evaluate_logs
from llmsurgery.api.operations import debias, prune, recover_alignment, redirect, remove_layernorm, unlearn
from llmsurgery.api.patches import apply, diff, revert, stack, verify
from llmsurgery.api.requests import File, Options, operate

__all__ = [
    "File",
    "Options",
    "apply",
    "audit",
    "compare",
    "debias",
    "diff",
    "evaluate_checkpoints",
    "evaluate_logs",
    "inspect_checkpoint",
    "lens",
    "linearity",
    "neurons",
    "operate",
    "prune",
    "recipes",
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
