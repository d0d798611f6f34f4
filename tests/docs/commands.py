"""Find every `llmsurgery` command in the README, the documentation and the examples for pipelines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOT_RUN = DOCS / "not-run.md"
GENERATED = DOCS / "methods"
"""Pages that `make docs` writes, two commands each."""

_FENCE = re.compile(r"^ *```(.*?)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_SHELL = ("", "sh", "bash", "console")
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_EXIT = re.compile(r"#.*\bexit (\d+)")


@dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
        page: Where it stands, relative to the repository.
        words: What follows `llmsurgery`, up to a redirection or the next command of the shell.
        code: The exit code that a comment beside it promises, 0 without one.
    """

    page: str
    words: tuple[str, ...]
    code: int = 0

    @property
    def text(self) -> str:
        """The command as one line, quoted anew."""
        return shlex.join(("llmsurgery", *self.words))


def pages() -> list[Path]:
    """The README and every hand-written or generated page, without the list of commands that are not run."""
    found = [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts and path != NOT_RUN]
    return [ROOT / "README.md", *found]


def examples() -> list[Path]:
    """The jobs for pipelines; the shell script is run as a whole."""
    return sorted((DOCS / "ci").glob("*.yml"))


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield the fenced blocks of a page: language and content."""
    for match in _FENCE.finditer(text):
        yield match.group(1).strip(), match.group(2)


def inline(text: str) -> list[str]:
    """Return the code spans of a page that stand in a line of text."""
    return _INLINE.findall(_FENCE.sub("", text))


def split(line: str) -> tuple[str, ...]:
    """Split a line as a shell does, up to a redirection, a pipe or the next command."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set("|&;<>"):
            break
        words.append(word)
    return tuple(words)


def lines_of(text: str) -> Iterator[str]:
    """Yield the lines of a script that call `llmsurgery`, those that are continued as one."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if match := re.match(r"^\s*(?:\$ )?(llmsurgery [a-z].*)$", line):
            yield match.group(1)


def strings_of(value: object) -> Iterator[str]:
    """Yield every text in a document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for one in value.values() for text in strings_of(one))
    elif isinstance(value, list):
        yield from (text for one in value for text in strings_of(one))


def commands_in(path: Path) -> Iterator[Command]:
    """Yield the commands of a page or of a file for pipelines."""
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        parts = [content for language, content in blocks(text) if language in _SHELL]
    else:
        parts = list(strings_of(yaml.safe_load(text)))
    for part in parts:
        for line in lines_of(part):
            code = _EXIT.search(line)
            yield Command(str(path.relative_to(ROOT)), split(line)[1:], int(code.group(1)) if code else 0)


def commands() -> list[Command]:
    """Every command of every page and file, the generated pages included."""
    return [command for path in (*pages(), *examples()) for command in commands_in(path)]


@dataclass(frozen=True)
class Excuse:
    """Commands that no test runs, and why.

    Attributes:
        count: How many the heading says that there are.
        reason: Why.
        texts: The commands.
    """

    count: int
    reason: str
    texts: tuple[str, ...]


def excuses() -> list[Excuse]:
    """Read the counted list: a heading `## COUNT: REASON` and a block of commands each."""
    parts = re.split(r"^## (\d+): (.*)$", NOT_RUN.read_text("utf-8"), flags=re.MULTILINE)
    found = []
    for count, reason, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        texts = [shlex.join(split(line)) for _, content in blocks(body) for line in lines_of(content)]
        found.append(Excuse(int(count), reason, tuple(texts)))
    return found
