"""A page of documentation per method, made from its docstring, its config and its spec, and the table of the README.

python -m llmsurgery.report.method_page docs/methods README.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from llmsurgery.methods.base import Method
from llmsurgery.methods.settings import Setting, settings_of


def method_page(method: Method) -> str:
    """Return the page of a method as Markdown: what it is, how to run it, every hyperparameter, the presets."""
    spec = method.spec
    title, _, rest = (sys.modules[type(method).__module__].__doc__ or "").strip().partition("\n")
    models = [f"--{name} {name.upper()}" for name in spec.models]
    # Without its figures nobody would run a repair.
    needs = dict.fromkeys((*spec.needs, *(("harmful", "task") if models else ())))
    data = " ".join((*models, *(f"--{need} {need}.jsonl" for need in needs)))
    kinds = sorted({spec.export, *spec.forms.values()})
    lines = [
        f"# `{spec.name}`",
        "",
        title,
        "",
        "```",
        f"llmsurgery {spec.task} --method {spec.name}    # the embedded demo",
        f"llmsurgery {spec.task} MODEL --method {spec.name} {data} -o OUT",
        "```",
        "",
        f"- paper: {spec.paper}",
        f"- needs: {', '.join(f'`--{need}`' for need in (*spec.models, *spec.needs)) or 'no data'}"
        + (f"; uses {', '.join(f'`--{use}`' for use in spec.uses)} where given" if spec.uses else ""),
        f"- result: {' or '.join(kinds)}" + (f" (`--set form={'|'.join(spec.forms)}`)" if spec.forms else ""),
        f"- stops at: `{spec.until}`" if spec.until else "- stops at: the end of its work, there is no stop rule",
        "",
        "## The method",
        "",
        "```text",
        rest.strip(),
        "```",
        "",
        "## Hyperparameters",
        "",
        "| `--set` | default | allowed | what it is |",
        "|---|---|---|---|",
        *(_setting_row(setting) for setting in settings_of(method.config_type).values()),
    ]
    for name, preset in spec.presets.items():
        values = ", ".join(f"`{key}={_plain(value)}`" for key, value in preset.items())
        lines += ["", f"`--set preset={name}`: {values}."]
    return "\n".join(lines) + "\n"


def _setting_row(setting: Setting) -> str:
    bounds = []
    if setting.minimum is not None:
        bounds.append(f"at least {setting.minimum:g}")
    if setting.maximum is not None:
        bounds.append(f"at most {setting.maximum:g}")
    allowed = ", ".join(f"`{choice}`" for choice in setting.choices) or ", ".join(bounds)
    cells = (f"`{setting.name}`", f"`{_plain(setting.default)}`", allowed, setting.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(value: object) -> str:
    return (",".join(map(str, value)) or "all") if isinstance(value, tuple) else str(value)


def write_pages(folder: Path) -> list[Path]:
    """Write the page of every method and a list of them; pages of methods that are gone are removed.

    Args:
        folder: Where they go.

    Returns:
        The files, the list first.
    """
    from llmsurgery.methods.registry import all_methods

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.md"):
        old.unlink()
    rows = ["# Methods", "", "| task | method | what it does |", "|---|---|---|"]
    written = [folder / "README.md"]
    for method in all_methods():
        page = folder / f"{method.spec.name}.md"
        page.write_text(method_page(method), "utf-8")
        written.append(page)
        rows.append(f"| `{method.spec.task}` | [`{method.spec.name}`]({page.name}) | {method.spec.summary} |")
    written[0].write_text("\n".join(rows) + "\n\nMade by `make docs`.\n", "utf-8")
    return written


BEGIN, END = "<!-- methods: written by `make docs` -->\n", "<!-- end of methods -->"
"""What stands before and after the table in a file that `write_table` fills in."""


def methods_table(folder: str) -> str:
    """Return the methods of each task with links to their pages, as Markdown.

    Args:
        folder: Where the pages lie, as a link.
    """
    from llmsurgery.methods.registry import all_methods

    tasks: dict[str, list[str]] = {}
    for method in all_methods():
        name = method.spec.name
        tasks.setdefault(method.spec.task, []).append(f"[`{name}`]({folder}/{name}.md)")
    rows = [f"| `llmsurgery {task}` | {', '.join(links)} |" for task, links in tasks.items()]
    return "\n".join(["| command | `--method` |", "|---|---|", *rows]) + "\n"


def write_table(file: Path, folder: Path) -> None:
    """Write the table of methods into a file, between the two marks.

    Args:
        file: A Markdown file that has both marks.
        folder: Where the pages of the methods lie.
    """
    text = file.read_text("utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    table = methods_table(folder.relative_to(file.parent).as_posix())
    file.write_text(f"{before}{BEGIN}{table}{END}{after}", "utf-8")


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
    for readme in sys.argv[2:]:
        write_table(Path(readme), Path(sys.argv[1]))
