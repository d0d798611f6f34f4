"""The direction of imports, and what the light commands may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llmsurgery

PACKAGE = Path(llmsurgery.__file__).parent
# A module imports from its left only; demo stands right of data.
ORDER = [
    "errors", "checkpoint", "edits", "arch", "compute", "data", "demo", "train", "evaluate", "methods", "run", "report",
    "api", "cli", "__main__",
]  # fmt: skip
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def layer(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_from_their_left_only(path: Path) -> None:
    own = ORDER.index(layer(path))
    for name in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "llmsurgery" and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= own, f"{path.name} imports {name}"
    if layer(path) in {"run", "methods", "evaluate", "train"}:
        assert not any(name.startswith("llmsurgery.report") for name in imported(ast.parse(path.read_text())))
    if layer(path) == "methods":
        assert not any(name.startswith("llmsurgery.checkpoint") for name in imported(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_imports_stand_at_module_level_only_where_they_may(path: Path) -> None:
    if layer(path) in {"compute", "train", "evaluate"}:
        return
    tree = ast.parse(path.read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in top:
        roots = {name.split(".")[0] for name in imported(node)}
        assert not roots & HEAVY, f"{path.name} imports {roots & HEAVY} at module level"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["unlearn", "--help"], ["eval", "--help"], ["inspect", "--help"], ["methods"], ["methods", "flat"]]
    + [
        [command, "--help"]
        for command in ("recover-alignment", "debias", "prune", "diff", "apply", "revert", "verify", "trace", "neurons")
    ]
    + [["lens", "--help"], ["run", "--help"], ["audit", "ches", "--help"], ["remove-layernorm", "--help"]]
    + [["linearity", "--help"]],
)
def test_light_commands_load_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom llmsurgery.cli.app import run\n"
        f"code = run({arguments!r})\n"
        f"print('LOADED', sorted(set(sys.modules) & {HEAVY | {'numpy', 'scipy'}!r}), code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED [] 0"


def test_byte_layer_needs_no_torch() -> None:
    modules = ", ".join(f"llmsurgery.{name}" for name in ("edits.apply", "edits.build", "edits.revert", "arch.detect"))
    code = f"import sys, {modules}\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
