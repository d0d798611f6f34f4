"""Several operations: recipes, and comparisons of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import fspath
from typing import TYPE_CHECKING, Any

from llmsurgery.api.requests import File, given_files, operate, uploaded
from llmsurgery.errors import UsageError
from llmsurgery.run.request import Request

if TYPE_CHECKING:
    from llmsurgery.compute.progress import Progress
    from llmsurgery.run.execute import Outcome


def run_recipe(
    recipe: File,
    assignments: Sequence[str] = (),
    *,
    out: File | None = None,
    dry_run: bool = False,
    force: bool = False,
    resume: bool = False,
    keep_steps: bool = False,
    trust_remote_code: bool = False,
    report: bool = False,
    report_examples: int = 3,
    push: str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Run a recipe: several operations in order, with gates; or repeat the run that a manifest records.

    Args:
        recipe: YAML or JSON file, name of a built-in recipe, `surgery.json` of a result, or the result's directory.
        assignments: Overrides such as "data.forget=rows.jsonl" or "steps.NAME.settings.lr=1e-4".
        out: Output directory; the recipe's, or a free name below `llmsurgery-out`, by default.
        dry_run: Only plan.
        force: Replace an existing output, and what an earlier run left.
        resume: Go on from what an interrupted run of the same recipe left.
        keep_steps: Keep the results of all steps in `OUT.steps`.
        trust_remote_code: Run model code that a checkpoint brings.
        report: As for `unlearn`.
        report_examples: As for `unlearn`, of each step.
        push: As for `unlearn`.
        progress: Told of long work and notices.

    Returns:
        The manifest of all steps together and the output directory; of a recipe of one step, what that returns.

    Raises:
        GateError: A gate after a step or at the end failed; the report lies beside the output.
        SurgeryError: See `llmsurgery.errors`; the source and earlier outputs are untouched.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.card import write_card
    from llmsurgery.report.page import write_report
    from llmsurgery.run.builtin import find_recipe
    from llmsurgery.run.chain import Manner
    from llmsurgery.run.chain import run_recipe as run_chain
    from llmsurgery.run.overrides import load_recipe
    from llmsurgery.run.push import check_push

    told = progress or Silent()
    loaded = load_recipe(find_recipe(fspath(recipe)), assignments)
    place = None if out is None else fspath(out)
    manner = Manner(place, dry_run, force, resume, keep_steps, trust_remote_code, report, report_examples)
    if push is not None:
        check_push(push)
    done = run_chain(loaded, manner, lambda request: operate(request, told), write_card, write_report, told)
    return uploaded(done, push, told)


def recipes(name: str | None = None, *, out: File | None = None, force: bool = False) -> Any:
    """List the built-in recipes, return one, or copy one to a file.

    Args:
        name: A built-in recipe; None lists all.
        out: File to write it to.
        force: Replace an existing file.

    Returns:
        A list of `{"name", "summary"}`, or `{"name", "summary", "text", "path"}` of one.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    from pathlib import Path

    from llmsurgery.run.builtin import builtin_recipes, copy_builtin, read_builtin

    if name is None:
        if out is not None:
            raise UsageError(
                "-o is given without a recipe", "one is copied at a time", "llmsurgery recipes NAME -o FILE"
            )
        return [{"name": name, "summary": summary} for name, summary in builtin_recipes().items()]
    text = read_builtin(name)
    if out is not None:
        copy_builtin(text, Path(out), force)
    return {
        "name": name,
        "summary": builtin_recipes()[name],
        "text": text,
        "path": None if out is None else fspath(out),
    }


def compare(
    recipes: Sequence[str],
    model: File | None = None,
    *,
    forget: File | None = None,
    retain: File | None = None,
    text: File | None = None,
    unseen: File | None = None,
    attacks: Sequence[str] = (),
    control: File | None = None,
    settings: Mapping[str, object] | None = None,
    retain_model: File | None = None,
    out: File | None = None,
    keep: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | str | None = None,
    force: bool = False,
    report: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Run several recipes on one model and the same data, each in a process of its own, and put them side by side.

    Args:
        recipes: `METHOD`, `METHOD:NAME=VALUE:...`, or YAML files with `method`, `settings`, `guard`, `until`, `seed`.
        model: Checkpoint directory, `.gguf` file or hub id; None for the embedded demo.
        forget: Data file of what is to be forgotten.
        retain: Data file of what is to stay.
        text: Plain text for perplexity.
        unseen: Data file of rows like the retain rows that no recipe is given; only measured.
        attacks: Attacks that every result is put to.
        control: As for `evaluate_checkpoints`.
        settings: Settings of the attacks, `attack.NAME` and `attack.ATTACK.NAME`; those of methods are in the recipes.
        retain_model: A model that never saw the forget rows: the control of the attacks, and for `forget.quality`.
        out: Directory for `compare.json`, `compare.md` and `compare.svg` (with matplotlib); by default a new one.
        keep: Keep every result below `out`.
        seed: Seed of every recipe that names none.
        device: As for operations.
        dtype: As for operations.
        batch_size: Rows per forward; "auto" halves them when memory runs out.
        force: Replace an existing output.
        report: Leave `report.html`, a page for people, in the output as well.
        trust_remote_code: Run model code that the checkpoint brings.
        progress: Told of every run.

    Returns:
        `rows` with figures, cost and exit code of every recipe, and the labels on the Pareto `front`.

    Raises:
        SurgeryError: A recipe, the data or the model is wrong; nothing has run then.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.comparison import publish_comparison
    from llmsurgery.run.compare import Attacking, read_recipes

    request = Request(
        task="unlearn",
        method="",
        model=None if model is None else fspath(model),
        data=given_files(forget=forget, retain=retain, text=text),
        retain_model=None if retain_model is None else fspath(retain_model),
        seed=seed,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        force=force,
        trust_remote_code=trust_remote_code,
    )
    place = None if out is None else fspath(out)
    return publish_comparison(
        read_recipes(recipes),
        request,
        Attacking(tuple(attacks), None if control is None else fspath(control), dict(settings or {})),
        place,
        keep,
        progress or Silent(),
        None if unseen is None else fspath(unseen),
        report,
    )
