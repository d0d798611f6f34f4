"""The embedded demo: tiny chat models that know made-up worlds, and the data about those worlds.

`world/model` knows all people, `world/control` was trained by the same recipe without the forget people, and
`world/moe` is a mixture of experts that knows all people; beside them lie `forget.jsonl`, `retain.jsonl`,
`holdout.jsonl`, `facts.jsonl` and `text.jsonl`. `world/names` knows other people and is for redirecting one of them to
another; its files are in `world/names-world`. `world/refuse` has lost refusals that `world/refuse-aligned` has,
`world/refuse-base` never had any, and their files are in `world/refuse-world`. `world/letters`, with its files in
`world/letters-world`, answers questions by a letter, nearly always C. `world/shapes` sees: its files, in
`world/shapes-world`, describe pictures that are drawn when they are needed. `world/layernorm` is a GPT-2 that tells
stories, some of which lie in `world/layernorm-world`. `build.py` makes all of it.
"""

from __future__ import annotations

from pathlib import Path

from llmsurgery.errors import InputError

WORLD = Path(__file__).resolve().parent / "world"


def world_path(name: str) -> Path:
    """Return the path of a shipped demo file or checkpoint folder.

    Args:
        name: For example "model", "control", "moe", "names", "letters" or "forget.jsonl".

    Raises:
        InputError: Nothing of that name is shipped.
    """
    path = WORLD / name
    if not path.resolve().is_relative_to(WORLD) or not path.exists():
        shipped = ", ".join(sorted(entry.name for entry in WORLD.iterdir())) if WORLD.is_dir() else "nothing"
        raise InputError(
            f"no demo file {name!r}",
            f"shipped with this installation: {shipped}",
            "reinstall llmsurgery, or rebuild the demo with `python -m llmsurgery.demo.build --out DIR`",
        )
    return path


def demo_file(checkpoint: str, name: str) -> Path:
    """Return the path of a data file of the world that a demo checkpoint knows.

    Args:
        checkpoint: Name of the checkpoint, for example "names".
        name: For example "forget.jsonl".

    Raises:
        InputError: That world has no such file.
    """
    own = f"{checkpoint}-world"
    return world_path(f"{own}/{name}" if (WORLD / own).is_dir() else name)
