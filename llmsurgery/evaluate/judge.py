"""A judge of answers: a command of the user's own, run without a shell.

It reads JSON Lines on standard input, one `{"id": n, "prompt": ..., "answer": ...}` per prompt, and writes as many on
standard output, `{"id": n, "harmful": true or false}`. Reports know it by its name and a digest; what it prints on
standard error is not shown, since it may quote prompts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmsurgery.checkpoint import file_digest
from llmsurgery.errors import InputError, UsageError


@dataclass(frozen=True)
class Judge:
    """A command that judges answers.

    Attributes:
        arguments: Program and arguments.
        seconds: Time that it has for all answers of a model.
    """

    arguments: tuple[str, ...]
    seconds: int

    @property
    def name(self) -> str:
        """Name of the program, without its directory."""
        return Path(self.arguments[0]).name

    @property
    def digest(self) -> str:
        """SHA-256 over the program, and over every argument or the file that it names."""
        digest = hashlib.sha256()
        for number, argument in enumerate(self.arguments):
            path = Path(shutil.which(argument) or argument) if number == 0 else Path(argument)
            content = file_digest(path) if path.is_file() else argument
            digest.update(f"{len(content)}:{content}".encode())
        return digest.hexdigest()

    def record(self) -> dict[str, object]:
        """Return what reports say of it."""
        return {"name": self.name, "sha256": self.digest}


def make_judge(arguments: Sequence[str], seconds: int) -> Judge | None:
    """Return the judge of a request, None without one.

    Raises:
        UsageError: There is no such program.
    """
    if not arguments:
        return None
    if shutil.which(arguments[0]) is None:
        raise UsageError(f"no program {arguments[0]!r} for --judge", "it cannot be run", "check name and permissions")
    return Judge(tuple(arguments), seconds)


def judge_answers(judge: Judge, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Return for each answer whether it is harmful.

    Args:
        judge: The judge.
        prompts: What was asked.
        answers: What was answered.

    Raises:
        InputError: The judge failed, took too long, or did not give one verdict per answer.
    """
    lines = [
        json.dumps({"id": number, "prompt": prompt, "answer": answer})
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    try:
        done = subprocess.run(
            judge.arguments,
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=judge.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _failed(judge, f"it took more than {judge.seconds} s", "raise --set eval.judge_seconds") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _failed(judge, type(error).__name__, "run it by hand on a line of JSON") from error
    if done.returncode:
        raise _failed(judge, f"it ended with exit code {done.returncode}", "run it by hand on a line of JSON")
    return parse_verdicts(judge, done.stdout, len(lines))


def parse_verdicts(judge: Judge, text: str, count: int) -> list[bool]:
    """Return the verdicts in what a judge wrote; arguments and errors as for `judge_answers`."""
    found: dict[int, bool] = {}
    for number, line in enumerate((line for line in text.splitlines() if line.strip()), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _failed(judge, f"line {number} of its output is not JSON", "print nothing else there") from error
        verdict = record if isinstance(record, dict) else {}
        row, harmful = verdict.get("id"), verdict.get("harmful")
        if not isinstance(row, int) or isinstance(row, bool) or not isinstance(harmful, bool):
            raise _failed(judge, f"line {number} of its output is no verdict", 'print {"id": n, "harmful": true}')
        if row in found or not 0 <= row < count:
            raise _failed(
                judge, f"line {number} of its output has the id {row}", f"ids are 0 to {count - 1}, each once"
            )
        found[row] = harmful
    if len(found) < count:
        raise _failed(judge, f"it judged {len(found)} of {count} answers", "print one verdict per answer")
    return [found[number] for number in range(count)]


def _failed(judge: Judge, why: str, fix: str) -> InputError:
    return InputError(f"the judge {judge.name} gave no verdicts", why, fix)
