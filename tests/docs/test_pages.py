"""The pages: they build without a broken link, nothing in them is out of date, and their examples of code are right."""

from __future__ import annotations

import io
import itertools
import re
import sys
import types
from pathlib import Path

import pytest

import llmsurgery
from llmsurgery.methods import registry
from llmsurgery.report.method_page import write_table

from .commands import DOCS, GENERATED, ROOT, blocks, pages

README = ROOT / "README.md"


def python_of(page: str) -> str:
    """Return the only Python block of a page."""
    (content,) = (content for language, content in blocks((DOCS / page).read_text("utf-8")) if language == "python")
    return content


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    from sphinx.application import Sphinx

    warnings = io.StringIO()
    # `dummy` resolves every link and writes no page.
    site = Sphinx(str(DOCS), str(DOCS), str(tmp_path), str(tmp_path), "dummy", status=None, warning=warnings)
    site.build()
    assert warnings.getvalue() == ""


def test_links_of_the_readme_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", README.read_text("utf-8"))
    assert all(target.startswith("https://") or (ROOT / target).is_file() for target in targets), targets
    assert len(targets) > 30


def test_the_readme_is_one_page_and_lists_every_method(tmp_path: Path) -> None:
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 130
    copy = tmp_path / "README.md"
    copy.write_text(text, "utf-8")
    write_table(copy, tmp_path / "docs" / "methods")
    assert copy.read_text("utf-8") == text, "run `make docs`"
    for name in ("demo", "test", "docs"):
        assert f"`make {name}`" in text or f"make {name} " in text


def test_every_make_target_and_module_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for path in (README, *DOCS.glob("*.md")):
        text = path.read_text("utf-8")
        assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets, path
        for module in re.findall(r"python -m (benchmarks[a-z0-9_.]*)", text):
            place = ROOT / module.replace(".", "/")
            assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), (path, module)


def test_the_picture_is_of_the_output_that_start_shows_and_loads_nothing() -> None:
    picture = (DOCS / "demo.svg").read_text("utf-8")
    shown = next(content for language, content in blocks((DOCS / "start.md").read_text("utf-8")) if language == "text")
    drawn = re.sub(r"&#160;", " ", picture)
    for name in ("forget.token_prob", "retain.token_prob", "utility.ppl_ratio"):
        (row,) = (line for line in shown.splitlines() if line.startswith(f"│ {name} "))
        # Each piece between the borders of the table is a text of the picture.
        assert all(cell.strip() in drawn for cell in row.split("│") if cell.strip()), row
    assert "@font-face" not in picture
    assert "url(http" not in picture


def test_the_example_of_a_method_is_a_method(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.all_methods()
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    module = types.ModuleType("llmsurgery.methods.unlearn.dampen")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(python_of("adding-a-method.md"), "dampen.py", "exec"), module.__dict__)
    outcome = llmsurgery.unlearn(
        checkpoints["tied_llama"], method="dampen", forget=data_files["forget"], out=tmp_path / "out",
        settings={"layers": "1", "eval.generate": False},
    )  # fmt: skip
    assert outcome.manifest["coverage"] == [{"role": "mlp.down", "targeted": 1, "matched": 1, "changed": 1}]


def test_the_example_of_an_architecture_is_a_file_of_the_package() -> None:
    family = ROOT / "llmsurgery" / "arch" / "families" / "mistral.py"
    assert python_of("adding-an-architecture.md") == family.read_text("utf-8")


def test_the_page_on_python_names_every_function() -> None:
    table = "".join(re.findall(r"^\|.*$", (DOCS / "python-api.md").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"`([a-z_]+)[`(]", table))
    assert set(llmsurgery.__all__) - {"SurgeryError", "__version__"} <= named


def test_messages_of_troubleshooting_are_those_of_the_package() -> None:
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "llmsurgery").rglob("*.py"))
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    assert rows[0].startswith("unknown hyperparameter"), "put together by `unknown_name`"
    for message in rows[1:]:
        # Names and numbers are put in; two words in a row are the package's own.
        words = message.split()
        assert any(" ".join(pair) in source for pair in itertools.pairwise(words)), message


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = (DOCS / "index.md").read_text("utf-8")
    for path in pages()[1:]:
        if path.parent == DOCS and path.name != "index.md":
            assert f"({path.name})" in listed, path
            assert f"\n{path.stem}\n" in listed, path
    assert GENERATED.is_dir()
