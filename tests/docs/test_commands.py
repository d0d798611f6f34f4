"""Every command of the documentation: it parses, and it runs as it is written or stands in the counted list."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from llmsurgery.cli.app import run
from llmsurgery.errors import UsageError

from .commands import GENERATED, NOT_RUN, ROOT, Command, blocks, commands, excuses, inline, pages, split
from .parsing import check, options_of
from .sandbox import build, lay

COMMANDS = list(dict.fromkeys(commands()))
BY_HAND = [command for command in COMMANDS if not (ROOT / command.page).is_relative_to(GENERATED)]
EXCUSED = {text: excuse.reason for excuse in excuses() for text in excuse.texts}
RUN = list({command.text: command for command in BY_HAND if command.text not in EXCUSED}.values())
PYTHON = {
    f"{path.name}-{number}": content
    for path in pages()
    if path.name == "python-api.md"
    for number, (language, content) in enumerate(blocks(path.read_text("utf-8")))
    if language == "python"
}

# One process builds the folder once and runs all that reads it.
pytestmark = pytest.mark.xdist_group("docs")


@pytest.fixture(scope="module")
def laid(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("docs")
    return build(root / "base", shutil.copytree(checkpoints["tied_llama"], root / "model"))


@pytest.mark.parametrize("page", sorted({command.page for command in COMMANDS}))
def test_commands_of_a_page_parse(page: str) -> None:
    # What a page shows as a mistake is run below.
    for command in COMMANDS:
        if command.page == page and command.code != UsageError.exit_code:
            check(command.words)


@pytest.mark.parametrize(
    "line",
    [
        "unlearn MODEL --method flat --forgets forget.jsonl",
        "unlearn MODEL --method flatt --forget forget.jsonl",
        "unlearn MODEL --method wanda --forget forget.jsonl",
        "unlearn MODEL --method flat --set learning_rate=1",
        "unlearn MODEL --method flat --set eval.rowz=1",
        "unlearn MODEL --method flat --set guard.wait=1",
        "unlearn MODEL --method flat --set divergence=tvv",
        "unlearn MODEL --method flat --require 'forget.token_probe<=1'",
        "unlearn MODEL --method flat --until 'forget.token_prob<1'",
        "unlearn MODEL --method auto --set trials=none_of_it",
        "eval OUT --suite tofy --suite-dir DIR",
        "eval OUT --suite wmdp --suite-dir DIR --set suite.subset=bio",
        "eval OUT --attack relearning",
        "eval OUT --attack relearn --set attack.relearn.size=1",
        "compare flat:leaning_rate=1",
        "methods flatt",
        "run unlearn-demos",
        "verify",
        "verifi OUT",
    ],
)
def test_the_check_sees_a_wrong_command(line: str) -> None:
    with pytest.raises(Exception, match=r".") as found:
        check(split(line))
    assert getattr(found.value, "exit_code", None) in (2, 3) or found.type is AssertionError


def test_options_and_commands_in_the_text_exist() -> None:
    known = options_of(None)
    for path in pages():
        for span in inline(path.read_text("utf-8")):
            words = span.split()
            if words[0] == "llmsurgery" and len(words) > 1 and words[1].isalpha() and words[1].islower():
                assert set(re.findall(r"(?<= )--?[a-z-]+", span)) <= options_of(words[1]), (path, span)
            elif words[0].startswith("--"):
                assert words[0].partition("=")[0] in known, (path, span)


def test_the_list_of_commands_that_are_not_run_is_true() -> None:
    listed = [text for excuse in excuses() for text in excuse.texts]
    assert len(set(listed)) == len(listed)
    assert set(listed) <= {command.text for command in BY_HAND}
    assert all(excuse.count == len(excuse.texts) for excuse in excuses())
    assert f"here: {len(listed)} commands" in NOT_RUN.read_text("utf-8")


@pytest.mark.parametrize("command", RUN, ids=lambda command: command.text)
def test_command_runs_as_it_is_written(
    command: Command, laid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lay(laid, tmp_path / "folder", command.words))
    assert run(command.words) == command.code


@pytest.mark.parametrize("name", sorted(PYTHON))
def test_python_runs_as_it_is_written(
    name: str, laid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(lay(laid, tmp_path / "folder", ("-o", "OUT")))
    exec(compile(PYTHON[name], name, "exec"), {})
    assert capsys.readouterr().out
