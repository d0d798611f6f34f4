"""`--method auto`: a small search over methods and strengths for the least forget probability within the gates.

Every trial is a run in a process of its own, whose result is measured and removed; the best one is then run once more
to the output, so that its manifest is that of an ordinary run. The search of optuna is kept in a journal after every
trial, and `--resume` goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmsurgery.checkpoint import file_digest
from llmsurgery.checkpoint.target import Claim, check_free
from llmsurgery.compute.progress import Progress
from llmsurgery.errors import GateError, SurgeryError, UsageError
from llmsurgery.evaluate.gates import Gate, parse_gate
from llmsurgery.methods.settings import as_record, resolve_config
from llmsurgery.run.compare import FORGET, Recipe, run_recipe, shares
from llmsurgery.run.forms import check_form
from llmsurgery.run.places import generated_name
from llmsurgery.run.prepare import prepare
from llmsurgery.run.request import Request
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import optuna

    from llmsurgery.run.execute import Outcome

METHODS = ("flat", "npo", "simnpo", "graddiff", "undial", "rmu")
RETAIN_GATE, TEXT_GATE = "retain.token_prob>=0.9x", "utility.ppl_ratio<=1.05"


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Settings of the search; everything else given with `--set` goes to every trial."""

    methods: tuple[str, ...] = option(METHODS, "methods to choose from; those that lack data are left out")
    trials: int = option(12, "runs to try", minimum=1)
    minutes: float = option(0.0, "start no trial after so many minutes; 0: no limit", minimum=0)
    lr_range: float = option(4.0, "step sizes from the method's own over this to it times this", minimum=1)
    goals: tuple[float, ...] = option((0.02, 0.5), "least and largest share of forget.token_prob to stop at")
    guard_weights: tuple[float, ...] = option((0.5, 4.0), "least and largest weight of the guard")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A method that the data suffice for, with what the strength is relative to.

    Attributes:
        lr: Step size it would take by itself, None if it does not train.
        guarded: Whether it would be guarded.
    """

    lr: float | None
    guarded: bool


def search(request: Request, progress: Progress, run: Callable[[Request], Outcome]) -> Outcome:
    """Search, then run the best recipe.

    Args:
        request: What is asked for, with the method `auto`.
        progress: Told of every trial.
        run: Runs one operation.

    Returns:
        The outcome of the best recipe's run. `OUT.search.json` beside it lists all trials.

    Raises:
        GateError: No trial held the gates; `OUT.search.json` says how near they came.
        SurgeryError: Whatever is wrong with the request, before the first trial.
    """
    known = {item.name for item in dataclasses.fields(SearchConfig)}
    config: SearchConfig = resolve_config(SearchConfig, {k: v for k, v in request.settings.items() if k in known})
    shared = {name: value for name, value in request.settings.items() if name not in known}
    request = dataclasses.replace(request, settings=shared)
    _check(request, config)
    out = Path(request.out) if request.out is not None else generated_name(request)
    require = request.require or ((RETAIN_GATE,) if request.model is None or "retain" in request.data else ())
    require = require if request.require else (*require, TEXT_GATE)
    request = dataclasses.replace(request, out=str(out), require=tuple(require), settings=shared)
    check_free(out, request.force)
    report = out.with_name(f"{out.name}.search.json")
    candidates = _candidates(request, config)
    with _workplace(out, request) as folder:
        study = _study(folder, request, config, candidates)
        _complete(study, request, config, candidates, progress)
        rows = [_row(trial) for trial in study.trials if _counts(trial)]
        best = _best(rows)
        document = {"settings": as_record(config), "require": list(require), "trials": rows, "best": best}
        temporary = folder / "report"
        temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", "utf-8")
        temporary.replace(report)
    if best is None:
        raise _none_held(rows, report)
    chosen = recipe_of(rows[best]["parameters"], candidates, shared)
    progress.notice(f"trial {best + 1} was the best ({_text(rows[best])}); it is run once more to {out}")
    return run(
        dataclasses.replace(request, method=chosen.method, settings=chosen.settings, until=chosen.until)
    )  # fmt: skip


def _check(request: Request, config: SearchConfig) -> None:
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("--method auto needs optuna", "it is not installed", "pip install optuna (extra `search`)")
    if request.dry_run:
        raise UsageError("--method auto has no --dry-run", "every trial is a plan of its own", "name a method")
    if request.until is not None:
        raise UsageError("--method auto has no --until", "the search chooses where to stop", "--set goals=0.05,0.3")
    if "lr" in request.settings or "guard.weight" in request.settings:
        raise UsageError(
            "the search chooses lr and guard.weight", "they are its strengths", "--set lr_range=1, or name a method"
        )
    for name, (low, *high) in (("goals", config.goals), ("guard_weights", config.guard_weights)):
        if len(high) != 1 or not 0 < low <= high[0]:
            raise UsageError(
                f"{name} are not a range", "two positive numbers, the smaller one first", f"{name}=0.1,0.5"
            )


def _candidates(request: Request, config: SearchConfig) -> dict[str, Candidate]:
    """Check every method; leave out those that cannot run, unless none can."""
    found: dict[str, Candidate] = {}
    problem: SurgeryError | None = None
    for method in config.methods:
        planned = dataclasses.replace(request, method=method, out=None, dry_run=True)
        try:
            prepared = prepare(planned)
            check_form(prepared)
        except SurgeryError as error:
            problem = error
            continue
        lr = cast(float | None, as_record(prepared.config).get("lr"))
        found[method] = Candidate(lr, lr is not None and request.guard != "none")
    if not found:
        raise problem or UsageError("no method is given", "the search needs some", "--set methods=flat,npo")
    return found


@contextlib.contextmanager
def _workplace(out: Path, request: Request) -> Iterator[Path]:
    """Yield a locked directory for the journal; it stays for `--resume` unless the block ends well."""
    claim = Claim(out.with_name(f"{out.name}.search"), request.force, request.resume)
    try:
        claim.state.mkdir(exist_ok=True)
        yield claim.state
    except BaseException:
        claim.release()
        raise
    claim.discard()


def _study(
    folder: Path, request: Request, config: SearchConfig, candidates: Mapping[str, Candidate]
) -> optuna.Study:  # fmt: skip
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(folder / "journal")))
    study = optuna.create_study(storage=storage, study_name="search", direction="minimize", load_if_exists=True)
    identity = _identity(request, config)
    if study.user_attrs.get("identity", identity) != identity:
        raise UsageError(
            "the search to resume is another one", "its data or settings differ", "start anew without --resume"
        )
    if not study.trials:
        study.set_user_attr("identity", identity)
        for method, candidate in candidates.items():
            study.enqueue_trial({"method": method, **_default(candidate, config)})
    for trial in study.trials:
        if trial.state == optuna.trial.TrialState.RUNNING:
            # Its process died with the search. The same parameters once more: all others stay what they were.
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
    return study


def _identity(request: Request, config: SearchConfig) -> str:
    # Data may also be a directory or a named data set; those stand for themselves.
    files = {name: file_digest(Path(path)) if Path(path).is_file() else path for name, path in request.data.items()}
    record = as_record(config)
    # A search may go on for longer.
    del record["trials"], record["minutes"]
    settings = {name: str(value) for name, value in request.settings.items()}
    return json.dumps([request.model, files, request.seed, settings, request.require, request.guard, record])


def _default(candidate: Candidate, config: SearchConfig) -> dict[str, float]:
    """The method's own strength, as parameters."""
    if candidate.lr is None:
        return {}
    low, high = config.goals
    values = {"lr_factor": 1.0, "goal": min(max(0.2, low), high)}
    if candidate.guarded:
        low, high = config.guard_weights
        values["guard_weight"] = min(max(1.0, low), high)
    return values


def _complete(
    study: optuna.Study,
    request: Request,
    config: SearchConfig,
    candidates: Mapping[str, Candidate],
    progress: Progress,
) -> None:  # fmt: skip
    """Run trials until the budget is spent."""
    import optuna

    started = time.monotonic()
    gates = [parse_gate(text, _Anything()) for text in request.require]
    with progress.task("trials", config.trials) as tick:
        while (done := sum(map(_counts, study.trials))) < config.trials:
            if config.minutes and time.monotonic() - started > 60 * config.minutes:
                progress.notice(f"the budget of {config.minutes:g} minutes ended the search after {done} trials")
                return
            # A sampler per trial: what it draws does not depend on whether the search was interrupted before.
            study.sampler = optuna.samplers.TPESampler(seed=request.seed + done, n_startup_trials=len(candidates))
            trial = study.ask()
            recipe = recipe_of(_suggest(trial, config, candidates), candidates, request.settings)
            with tempfile.TemporaryDirectory(prefix="llmsurgery-") as place:
                row = run_recipe(recipe, dataclasses.replace(request, out=None), Path(place) / "out")
            _tell(study, trial, row, gates)
            tick(note=_text(_row(study.trials[trial.number])))


class _Anything(frozenset[str]):
    """Every datum is there: the runs themselves have checked that."""

    def __contains__(self, name: object) -> bool:
        return True


def _counts(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial ended, well or not, rather than died with the search."""
    return trial.state.is_finished() and "exit_code" in trial.user_attrs


def _suggest(trial: optuna.Trial, config: SearchConfig, candidates: Mapping[str, Candidate]) -> dict[str, Any]:
    method = trial.suggest_categorical("method", list(candidates))
    values: dict[str, Any] = {"method": method}
    if candidates[method].lr is not None:
        values["lr_factor"] = trial.suggest_float("lr_factor", 1 / config.lr_range, config.lr_range, log=True)
        values["goal"] = trial.suggest_float("goal", *config.goals, log=True)
    if candidates[method].guarded:
        values["guard_weight"] = trial.suggest_float("guard_weight", *config.guard_weights, log=True)
    return values


def recipe_of(
    parameters: Mapping[str, Any], candidates: Mapping[str, Candidate], shared: Mapping[str, object]
) -> Recipe:  # fmt: skip
    """Return the run that a trial's parameters stand for.

    Args:
        parameters: `method`, and `lr_factor`, `goal` and `guard_weight` where the method has them.
        candidates: The methods.
        shared: Settings of every trial.
    """
    method = parameters["method"]
    settings, until = dict(shared), None
    lr = candidates[method].lr
    if lr is not None:
        settings["lr"] = float(f"{lr * parameters['lr_factor']:.3g}")
        until = f"{FORGET}<={parameters['goal']:.3g}x"
    if candidates[method].guarded:
        settings["guard.weight"] = float(f"{parameters['guard_weight']:.3g}")
    return Recipe(method, method, settings, until=until)


def _tell(study: optuna.Study, trial: optuna.Trial, row: Mapping[str, Any], gates: Sequence[Gate]) -> None:
    import optuna

    trial.set_user_attr("exit_code", row["exit_code"])
    metrics = row.get("metrics") or ((row.get("report") or {}).get("metrics"))
    if not metrics:
        trial.set_user_attr("error", (row.get("error") or {}).get("what", ""))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return
    trial.set_user_attr("metrics", {name: figure["after"]["value"] for name, figure in metrics.items()})
    shortfalls = {str(gate): shortfall(gate, metrics[gate.metric]) for gate in gates}
    trial.set_user_attr("shortfalls", list(shortfalls.values()))
    for name, value in shortfalls.items():
        # Above 0 the trial counts as infeasible.
        trial.set_constraint(name, value)
    study.tell(trial, shares(metrics).get(FORGET, 1.0))


def shortfall(gate: Gate, figure: Mapping[str, Any]) -> float:
    """Return by which share of its limit a gate is missed, at most 1; 0 or less where it holds.

    Args:
        gate: The gate.
        figure: `before` and `after` of its metric, as in a manifest.
    """
    value = figure["after"]["value"]
    limit = gate.limit(figure["before"]["value"])
    if value is None or not math.isfinite(limit):
        return 1.0
    missing = (value - limit if gate.operator == "<=" else limit - value) / max(abs(limit), 1e-12)
    return float(min(missing, 1.0))


def _row(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    return {
        "parameters": trial.params,
        "exit_code": trial.user_attrs.get("exit_code"),
        "error": trial.user_attrs.get("error"),
        "forget_kept": trial.value,
        "shortfalls": trial.user_attrs.get("shortfalls"),
        "metrics": trial.user_attrs.get("metrics"),
    }


def _best(rows: Sequence[Mapping[str, Any]]) -> int | None:
    held = [place for place, row in enumerate(rows) if row["exit_code"] == 0]
    return min(held, key=lambda place: float(rows[place]["forget_kept"]), default=None)


def _text(row: Mapping[str, Any]) -> str:
    parameters = row["parameters"]
    words = ", ".join(f"{name} {value:.3g}" for name, value in parameters.items() if name != "method")
    kept = row["forget_kept"]
    ended = f"exit {row['exit_code']}" if kept is None else f"forget kept {kept:.3f}"
    held = "" if kept is None else ", gates held" if row["exit_code"] == 0 else ", a gate failed"
    return f"{parameters['method']} {words}: {ended}{held}"


def _none_held(rows: Sequence[Mapping[str, Any]], report: Path) -> GateError:
    measured = [row for row in rows if row["shortfalls"]]
    nearest = min(measured, key=lambda row: max(row["shortfalls"]), default=None)
    error = GateError(
        f"none of {len(rows)} trials held the gates",
        "all trials failed" if nearest is None else f"the nearest: {_text(nearest)}",
        f"read {report}; loosen --require, or give more --set trials",
    )
    error.report = json.loads(report.read_text("utf-8"))
    return error
