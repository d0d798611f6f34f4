"""Models, templates and surroundings made to harm: what a run makes of them."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.forked import run_forked, start_function, wait
from benchmarks.faults.kills import Stage
from benchmarks.faults.places import leavings, make_model, prune, tree, unlearn
from benchmarks.faults.tally import Tally

_TURNS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

TEMPLATES = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + _TURNS,
    "a longer range": "{% for i in range(10**9) %}x{% endfor %}" + _TURNS,
    "a text of 100 GB": "{{ 'x' * 10**11 }}" + _TURNS,
    "a text of 3 GB": "{{ 'x' * (3 * 10**9) }}" + _TURNS,
    "a list of 800 GB": "{{ ([0] * 10**11)|length }}" + _TURNS,
    "padding": "{{ '%999999999999d'|format(1) }}" + _TURNS,
    "fifty megabytes": "{{ 'x' * (5 * 10**7) }}" + _TURNS,
    "a tower of powers": "{{ 9 ** (9 ** 9) }}" + _TURNS,
    "a division by zero": "{{ 1 // 0 }}" + _TURNS,
    "a macro without an end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + _TURNS,
    "attributes of Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}" + _TURNS,
    "a method of a function": "{{ raise_exception.__globals__['os'].system('echo') }}" + _TURNS,
    "an index out of range": "{{ [1, 2][7] + 1 }}" + _TURNS,
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}" + _TURNS,
    "not a template": "{% for %}{{",
    "an include": "{% include '/etc/passwd' %}" + _TURNS,
    "an import": "{% import '/etc/passwd' as p %}" + _TURNS,
    "a null byte": "\0" + _TURNS,
    "a message to the user": "{{ raise_exception('no') }}",
    "a template without the answer": "nothing",
}


def templates(stage: Stage, tries: int) -> Tally:
    """Plan a run of models with hostile chat templates."""
    from benchmarks.faults.corpus import SECONDS

    tally = Tally("hostile chat templates", "exit code 0 or 3 with a message, within seconds and a GiB or so")
    folder = make_model(stage.work / "templates")
    path = folder / "chat_template.jinja"
    for name, text in list(TEMPLATES.items())[:: max(1, len(TEMPLATES) // tries)]:
        path.write_text(text)

        def plan() -> int:
            from llmsurgery.cli.app import run

            code = run([*unlearn(folder, stage.data, stage.work / "no"), "--dry-run"])
            print(f"\nmemory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}")
            return code

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        code = wait(start_function(plan, stage.log), SECONDS * 12)
        words = stage.log.read_text()
        problems = [] if code in (0, 3) else [f"exit code {code}: {words[-300:]}"]
        peak = int(words.rpartition("memory ")[2] or 0) if "memory " in words else 0
        if peak > before + 1500:
            problems.append(f"memory grew by {peak - before} MiB")
        tally.add(f"exit code {code}", problems, name)
    return tally


def links(stage: Stage, step: int = 1) -> Tally:
    """Edit models whose shards are symbolic links, some of them to places that no checkpoint leads to.

    Args:
        stage: Where it runs.
        step: 2 tries every second of them, and so on.
    """
    tally = Tally("symlinked shards", "a copy that shares nothing with what the links lead to, or a message")
    elsewhere = stage.work / "elsewhere"
    elsewhere.mkdir()

    def linked(root: Path) -> int:
        for path in root.glob("*.safetensors"):
            path.rename(elsewhere / path.name)
            path.symlink_to(elsewhere / path.name)
        return 0

    def lead(to: str, code: int) -> Callable[[Path], int]:
        def change(root: Path) -> int:
            path = sorted(root.glob("*.safetensors"))[0]
            path.unlink()
            path.symlink_to(path.name if to == "itself" else to)
            return code

        return change

    def inside(root: Path) -> int:
        os.mkfifo(root / "pipe")
        return lead("pipe", 8)(root)

    changes = {
        "to a cache": linked,
        "to itself": lead("itself", 8),
        "to a device": lead("/dev/zero", 8),
        "to a folder": lead(".", 8),
        "to a pipe": inside,
        "to nothing": lead("nowhere", 8),
        "to a text": lead("/etc/passwd", 8),
    }
    for name, change in list(changes.items())[::step]:
        root, out = make_model(stage.work / f"links {name}"), stage.out()
        expected = change(root)
        before = tree(elsewhere)
        code = run_forked(prune(root, stage.data, out), stage.log)
        problems = [] if code == expected else [f"exit code {code}: {stage.message()}"]
        if tree(elsewhere) != before:
            problems.append("what the links lead to has changed")
        if code == 0 and any(path.is_symlink() for path in out.rglob("*")):
            problems.append("the output holds links")
        if code and leavings(out):
            problems.append(f"{leavings(out)} left")
        tally.add(f"exit code {code}", problems, name)
    return tally


def modes(stage: Stage, step: int = 1) -> Tally:
    """Edit models whose files and folders have unusual modes."""
    tally = Tally("modes of files", "the output has the modes of the source, no more and no less")
    for bits, folder in ((0o666, 0o777), (0o600, 0o700), (0o444, 0o555), (0o640, 0o2750))[::step]:
        root, out = make_model(stage.work / f"modes {bits:o}"), stage.out()
        for path in root.iterdir():
            path.chmod(bits)
        root.chmod(folder)
        code = run_forked(prune(root, stage.data, out), stage.log)
        problems = [f"exit code {code}: {stage.message()}"] if code else []
        if code == 0:
            wrong = [p.name for p in root.iterdir() if (out / p.name).stat().st_mode & 0o777 != bits]
            problems += [f"{wrong} have other modes"] if wrong else []
            if out.stat().st_mode & 0o777 != folder & 0o777:
                problems.append(f"the folder has mode {out.stat().st_mode & 0o777:o}")
        tally.add(f"{bits:o} in {folder:o}", problems, f"{bits:o}")
    return tally


SECRET = "hf_SeCrEt0123456789abcdef"


def secrets(stage: Stage, step: int = 1) -> Tally:
    """Give tokens in the environment, in addresses and to a judge, and look for them in everything that is written."""
    tally = Tally("secrets", "no manifest, report, card or plan holds a token")
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")

    def keep() -> None:
        os.environ.update(dict.fromkeys(names, SECRET))
        os.environ["HTTPS_PROXY"] = f"http://user:{SECRET}@proxy"

    address = f"https://user:{SECRET}@huggingface.co/some/model"
    harmful = stage.work / "harmful.jsonl"
    harmful.write_text('{"prompt": "Describe the purple cup."}\n')
    judge = stage.work / "judge.sh"
    judge.write_text('#!/bin/sh\nsed \'s/\\("id": [0-9]*\\).*/\\1, "harmful": false}/\'\n')
    judge.chmod(0o755)
    failing = ["--require", "utility.ppl<=0"]
    tries: dict[str, tuple[list[str], int]] = {
        "environment": (unlearn(stage.model, stage.data, stage.out()), 0),
        "environment, report of a failed gate": (unlearn(stage.model, stage.data, stage.out()) + failing, 6),
        "environment, closed form": (prune(stage.model, stage.data, stage.out()), 0),
        "environment, JSON": ([*prune(stage.model, stage.data, stage.out()), "--json"], 0),
        "address of a model": (prune(Path(address), stage.data, stage.out()), 3),
        "address of a model, JSON": ([*prune(Path(address), stage.data, stage.out()), "--json"], 3),
        "address of a retain model": (
            [*unlearn(stage.model, stage.data, stage.out()), "--retain-model", address], 3,
        ),
        "address of data": (prune(stage.model, {"text": Path(f"{address}/x.jsonl")}, stage.out()), 3),
        "argument of a judge": (
            ["eval", str(stage.model), "--harmful", str(harmful), "--judge", f"{judge} --key={SECRET}", "--json"], 0,
        ),
    }  # fmt: skip
    for name, (words, expected) in list(tries.items())[::step]:
        out = Path(words[words.index("-o") + 1]) if "-o" in words else stage.out()
        code = run_forked(words, stage.log, keep)
        problems = [] if code == expected else [f"exit code {code}: {stage.message()}"]
        written = [path for path in out.parent.rglob("*") if path.is_file()] if out.parent.exists() else []
        problems += [f"{path.name} holds it" for path in [stage.log, *written] if SECRET.encode() in path.read_bytes()]
        tally.add(f"exit code {code}", problems, name)
        if out.parent.exists():
            shutil.rmtree(out.parent)
    return tally


def manifest_of(stage: Stage) -> Path:
    """Return the manifest of an undisturbed run."""
    stage.whole("training")
    found = sorted(stage.work.glob("out*/result/surgery.json"))
    return next(path for path in found if "steps" not in json.loads(path.read_text()))
