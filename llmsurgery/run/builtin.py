"""The recipes that ship with the package."""

from __future__ import annotations

from pathlib import Path

from llmsurgery.errors import unknown_name

FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def builtin_recipes() -> dict[str, str]:
    """Return what every built-in recipe is for, by name: its leading comment."""
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        lines = []
        for line in path.read_text("utf-8").splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.removeprefix("#").strip())
        found[path.stem] = " ".join(lines)
    return found


def read_builtin(name: str) -> str:
    """Return the text of a built-in recipe.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in builtin_recipes():
        raise unknown_name("recipe", name, builtin_recipes(), "llmsurgery recipes lists them all")
    return (FOLDER / f"{name}.yaml").read_text("utf-8")


def find_recipe(text: str) -> Path:
    """Return the file of a recipe: a path, or the name of a built-in one where no such file exists."""
    path = Path(text)
    return FOLDER / f"{text}.yaml" if not path.exists() and text in builtin_recipes() else path


def copy_builtin(text: str, path: Path, force: bool) -> None:
    """Write a recipe to a file.

    Raises:
        UsageError: The file exists and may not be replaced.
        ResourceError: It cannot be written.
    """
    from llmsurgery.run.diff import check_new_file, new_file

    check_new_file(path, force)
    with new_file(path) as stream:
        stream.write(text.encode())
