"""`compare`: several recipes on one model and the same data, each in a process of its own, as one table."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmsurgery.compute.progress import Progress
from llmsurgery.data.documents import parse_yaml
from llmsurgery.demo import world_path
from llmsurgery.errors import InputError, UsageError, unknown_name
from llmsurgery.methods.registry import find_method
from llmsurgery.run.request import Request

KEYS = ("method", "settings", "guard", "until", "seed")
TASK = "unlearn"
FORGET, RETAIN, PERPLEXITY = "forget.token_prob", "retain.token_prob", "utility.ppl_ratio"
UNSEEN = "unseen.token_prob"


@dataclass(frozen=True)
class Recipe:
    """One method with its options.

    Attributes:
        label: Name in the table; unlike any other.
        method: Method name.
        settings: Hyperparameters by name.
        guard: As `--guard`; None for the method's default.
        until: As `--until`; None for the method's default.
        seed: As `--seed`; None for the seed of the comparison.
    """

    label: str
    method: str
    settings: Mapping[str, object] = field(default_factory=dict)
    guard: str | None = None
    until: str | None = None
    seed: int | None = None

    def words(self) -> list[str]:
        """Return the words of the command line that say what this recipe says."""
        words = ["--method", self.method]
        words += [word for name, value in self.settings.items() for word in ("--set", f"{name}={_text(value)}")]
        named = {"--guard": self.guard, "--until": self.until, "--seed": self.seed}
        return words + [word for name, value in named.items() if value is not None for word in (name, str(value))]


@dataclass(frozen=True)
class Attacking:
    """What every result is put to.

    Attributes:
        names: Attacks.
        control: Data file of rows that the source does not know.
        settings: Settings by name, `attack.NAME` and `attack.ATTACK.NAME`.
    """

    names: Sequence[str] = ()
    control: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)

    def words(self) -> list[str]:
        """Return the words of `eval` that say this."""
        words = ["--attack", ",".join(self.names)] + ([] if self.control is None else ["--control", self.control])
        return words + [word for name, value in self.settings.items() for word in ("--set", f"{name}={_text(value)}")]

    def check(self) -> None:
        """Refuse what nothing would look at.

        Raises:
            UsageError: Says what.
        """
        for name in self.settings:
            if not name.startswith("attack."):
                raise UsageError(
                    f"--set {name} does not say for which recipe",
                    "with compare, --set takes settings of attacks, attack.NAME=VALUE",
                    "write METHOD:NAME=VALUE, or a YAML file per recipe",
                )
        if not self.names and (self.control is not None or self.settings):
            given = "--control" if self.control is not None else f"--set {next(iter(self.settings))}"
            raise UsageError(f"{given} is given without an attack", "it would do nothing", "give --attack NAME")


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_recipes(texts: Sequence[str]) -> list[Recipe]:
    """Read recipes: `METHOD`, `METHOD:NAME=VALUE:NAME=VALUE`, or a YAML file with the keys of `KEYS`.

    Args:
        texts: What the user gave; the same label twice gets a number.

    Raises:
        UsageError: Fewer than one recipe, or an unknown key.
        InputError: A file that is missing or malformed.
    """
    if not texts:
        raise UsageError(
            "no recipe is given", "compare needs methods to compare", "for example: compare flat npo simnpo"
        )
    recipes: list[Recipe] = []
    for text in texts:
        recipe = _from_file(Path(text)) if text.endswith((".yaml", ".yml")) else _from_words(text)
        taken = {other.label for other in recipes}
        number, label = 2, recipe.label
        while label in taken:
            label, number = f"{recipe.label}-{number}", number + 1
        recipes.append(replace(recipe, label=label))
    return recipes


def _from_words(text: str) -> Recipe:
    method, *parts = text.split(":")
    settings: dict[str, object] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise UsageError(
                f"{part!r} in the recipe {text!r} is not NAME=VALUE", "", "write METHOD:NAME=VALUE:NAME=VALUE"
            )
        settings[name] = value
    special: dict[str, object] = {name: settings.pop(name) for name in ("guard", "until", "seed") if name in settings}
    return _recipe(text, {"method": method, "settings": settings, **special})


def _from_file(path: Path) -> Recipe:
    try:
        content = parse_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"the recipe {str(path)!r} cannot be read", str(error.strerror or error), "") from error
    except ValueError as error:
        raise InputError(f"the recipe {str(path)!r} is not YAML", str(error), "") from error
    if not isinstance(content, dict) or "method" not in content:
        raise InputError(f"the recipe {str(path)!r} names no method", f"its keys are {', '.join(KEYS)}", "")
    for key in content:
        if key not in KEYS:
            raise unknown_name(f"key in {path.name}", str(key), KEYS)
    if not isinstance(content.get("settings", {}), dict):
        raise InputError(f"`settings` in {str(path)!r} is not a mapping", "it holds hyperparameters by name", "")
    return _recipe(path.stem, content)


def _recipe(label: str, content: Mapping[str, Any]) -> Recipe:
    seed = content.get("seed")
    if seed is not None and not str(seed).isdigit():
        raise UsageError(
            f"seed {seed!r} in the recipe {label!r} is not a number", "seeds are whole numbers from 0 on", ""
        )
    named = {name: None if content.get(name) is None else str(content[name]) for name in ("guard", "until")}
    settings = dict(content.get("settings", {}))
    return Recipe(label, str(content["method"]), settings, **named, seed=None if seed is None else int(seed))


def compare_recipes(
    recipes: Sequence[Recipe],
    request: Request,
    attacks: Attacking,
    keep: Path | None,
    progress: Progress,
    unseen: str | None = None,
) -> dict[str, Any]:
    """Run every recipe on the same model and data, one after the other.

    Args:
        recipes: What is compared.
        request: Model, data, seed, device and dtype for all; its method, settings, guard and until are not used.
        attacks: Attacks that every result is put to.
        keep: Directory in which the results stay; None removes each once it is measured.
        progress: Told of every run.
        unseen: Data file of rows like the retain rows that no recipe is given; what is kept of them is measured too.

    Returns:
        JSON values: `rows`, one per recipe with figures, cost and exit code, and the labels on the Pareto `front`.

    Raises:
        SurgeryError: Whatever is wrong with a recipe or the data, before the first run.
    """
    _check(recipes, request)
    attacks.check()
    before = None if unseen is None else _unseen(request, _source(request), unseen)
    rows = []
    with tempfile.TemporaryDirectory(prefix="llmsurgery-") as folder, progress.task("recipes", len(recipes)) as tick:
        for recipe in recipes:
            out = (keep or Path(folder)) / recipe.label.replace("/", "_")
            row = run_recipe(recipe, request, out)
            if row["exit_code"] == 0 and attacks.names:
                row["attacks"] = _attack(recipe, request, out, attacks)
            if row["exit_code"] == 0 and unseen is not None and before is not None:
                row["shares"][UNSEEN] = _unseen(request, out, unseen) / before
            rows.append(row)
            tick(note=recipe.label)
            if keep is None:
                _remove(out)
    data = {**request.data, **({} if unseen is None else {"unseen": unseen})}
    return {"model": request.model or "demo", "data": data, "rows": rows, "front": pareto_front(rows)}


def _check(recipes: Sequence[Recipe], request: Request) -> None:
    """Refuse a wrong recipe before the first one has run for an hour."""
    from llmsurgery.run.forms import check_form
    from llmsurgery.run.prepare import prepare

    for recipe in recipes:
        wanted = replace(
            request,
            method=recipe.method,
            settings=recipe.settings,
            guard=recipe.guard,
            until=recipe.until,
            out=None,
            dry_run=True,
        )
        check_form(prepare(wanted))


def _common(request: Request) -> list[str]:
    words = [word for name, path in request.data.items() for word in (f"--{name}", path)]
    words += ["--device", request.device, "--dtype", request.dtype]
    words += [] if request.batch_size is None else ["--batch-size", str(request.batch_size)]
    return words + (["--trust-remote-code"] if request.trust_remote_code else [])


def run_recipe(recipe: Recipe, request: Request, out: Path) -> dict[str, Any]:
    """Run one recipe in a process of its own, which gives a peak memory of its own.

    Args:
        recipe: The recipe.
        request: Model, data, seed, gates and options.
        out: Where the result goes.

    Returns:
        JSON values: label, method, settings, exit code; figures, cost and record of a run that ended well, `error` and
        for a failed gate `report` of another.
    """
    model = [] if request.model is None else [request.model]
    seed = [] if recipe.seed is not None else ["--seed", str(request.seed)]
    words = [TASK, *model, *recipe.words(), *_common(request), *seed, "-o", str(out), "--json", "--no-undo"]
    words += [word for gate in request.require for word in ("--require", gate)]
    words += [] if request.guard is None or recipe.guard is not None else ["--guard", request.guard]
    words += [] if request.retain_model is None else ["--retain-model", request.retain_model]
    words += [] if request.quantize == "none" else ["--quantize", request.quantize]
    code, document = _call(words)
    row: dict[str, Any] = {
        "label": recipe.label,
        "method": recipe.method,
        "settings": dict(recipe.settings),
        "exit_code": code,
    }
    if code != 0:
        return {**row, "error": document.get("error"), **({"report": document["report"]} if code == 6 else {})}
    operation = document["operations"][0]
    return {
        **row,
        "resolved": operation["settings"],
        "guard": operation["guard"]["source"],
        "until": operation["until"],
        "record": operation["record"],
        "metrics": document["metrics"],
        "shares": shares(document["metrics"]),
        "cost": document["cost"],
    }


def _attack(recipe: Recipe, request: Request, out: Path, attacks: Attacking) -> object:
    """Return what the attacks recover, by name; the demo brings source, control and rows along."""
    source, control, data = request.model, request.retain_model, dict(request.data)
    if source is None:
        demo = find_method(recipe.method, TASK).spec.demo
        source = str(world_path(demo))
        control = control or (str(world_path("control")) if demo == "model" else None)
        for name in ("forget", "retain"):
            data.setdefault(name, str(world_path(f"{name}.jsonl")))
    common = _common(replace(request, data=data, trust_remote_code=True))
    words = ["eval", str(out), *common, "--json", "--source", source, "--set", "generate=false"]
    words += [] if control is None else ["--retain-model", control]
    code, document = _call([*words, *attacks.words()])
    return document["models"][0]["attacks"] if code == 0 else {"exit_code": code, "error": document.get("error")}


def _source(request: Request) -> str:
    if request.model is None:
        raise UsageError("--unseen needs a model", "the demo has no rows of its kind to spare", "give --model")
    return request.model


def _unseen(request: Request, model: str | Path, unseen: str) -> float:
    """Return the token probability of rows that no recipe is given."""
    # The code of a bundle has just been written by this program.
    trust = request.trust_remote_code or model != request.model
    common = _common(replace(request, data={"retain": unseen}, trust_remote_code=trust))
    # A model is always measured on some text; of that nothing is needed here.
    few = ["--set", "generate=false", "--set", "text_rows=1"]
    code, document = _call(["eval", str(model), *common, *few, "--json"])
    if code != 0:
        error = document.get("error") or {}
        raise InputError(f"the rows of {unseen!r} cannot be measured on {str(model)!r}", str(error.get("what")), "")
    return float(document["models"][0]["metrics"][RETAIN]["value"])


def _call(words: list[str]) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([sys.executable, "-m", "llmsurgery", *words], capture_output=True, check=False)
    try:
        return done.returncode, json.loads(done.stdout)
    except ValueError:
        # A process that was killed leaves no document; its last words are all there is.
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        what = f"the run ended with exit code {done.returncode}"
        return done.returncode or 1, {"error": {"kind": "killed", "what": what, "why": " ".join(last), "fix": ""}}


def _remove(out: Path) -> None:
    from llmsurgery.checkpoint.target import remove

    remove(out)


def shares(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return what is kept of each token probability, and the perplexity ratio.

    Args:
        metrics: `metrics` of a manifest.
    """
    found = {}
    for name in (FORGET, RETAIN):
        if name in metrics and metrics[name]["before"]["value"]:
            found[name] = metrics[name]["after"]["value"] / metrics[name]["before"]["value"]
    if PERPLEXITY in metrics and metrics[PERPLEXITY]["after"]["value"] is not None:
        found[PERPLEXITY] = metrics[PERPLEXITY]["after"]["value"]
    return found


def pareto_front(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the labels that no other row beats: less forget probability kept and more of the rest.

    The rest is the share of the token probability of the unseen rows, without them of the retain rows, and without
    either the perplexity ratio.

    Args:
        rows: Rows of `compare_recipes`; failed ones are never on the front.
    """
    points = [(row["label"], *point) for row in rows if (point := trade_off(row)) is not None]
    return [
        label
        for label, forget, rest in points
        if not any(f <= forget and r >= rest and (f, r) != (forget, rest) for _, f, r in points)
    ]


def trade_off(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return (forget share, what is kept of the rest) of a row; None where it failed or lacks figures."""
    kept = row.get("shares", {})
    if FORGET not in kept:
        return None
    for name in (UNSEEN, RETAIN):
        if name in kept:
            return kept[FORGET], kept[name]
    return (kept[FORGET], -kept[PERPLEXITY]) if PERPLEXITY in kept else None
