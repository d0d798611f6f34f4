"""`llmsurgery eval`."""

from __future__ import annotations

from typing import Any, cast

from llmsurgery.cli import options
from llmsurgery.cli.output import Output
from llmsurgery.cli.summary import Describe
from llmsurgery.cli.summary import summary as summarised
from llmsurgery.errors import UsageError


def evaluate(
    models: options.Models = None,
    forget: options.Forget = None,
    retain: options.Retain = None,
    holdout: options.Holdout = None,
    authors: options.Authors = None,
    facts: options.Facts = None,
    text: options.Text = None,
    mcq: options.Mcq = None,
    position_invariant: options.PositionInvariant = False,
    contrast: options.Contrast = None,
    source: options.Source = None,
    retain_model: options.RetainModel = None,
    retain_log: options.RetainLog = None,
    from_log: options.FromLog = None,
    log: options.Log = None,
    attacks: options.Attacks = None,
    control: options.Control = None,
    harmful: options.Harmful = None,
    task: options.Task = None,
    harmless: options.Harmless = None,
    judge: options.Judge = None,
    suite: options.Suite = None,
    suite_dir: options.SuiteDir = None,
    assignments: options.Assignments = None,
    require: options.Require = None,
    report: options.ReportFile = None,
    summary: options.Summary = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = None,
    trust_remote_code: options.RemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure checkpoints on the same data, or recompute the figures of a published log.

    Example: llmsurgery eval OUT --source MODEL --forget forget.jsonl --retain retain.jsonl
    """
    from llmsurgery import api
    from llmsurgery.methods.settings import parse_assignments

    output = Output(as_json, quiet, verbose)
    settings, gates = parse_assignments(assignments or []), require or []
    data = {"forget": forget, "retain": retain, "holdout": holdout, "authors": authors, "facts": facts, "text": text}
    data |= {"control": control, "harmful": harmful, "task": task, "harmless": harmless}
    data |= {"mcq": mcq, "contrast": contrast}
    arguments = options.split_judge(judge)
    with summarised(summary, output, _describe) as tell:
        if from_log:
            others = {"source": source, "retain-model": retain_model, "suite": suite, "suite-dir": suite_dir, **data}
            given = [f"--{name}" for name, value in others.items() if value is not None] + ["--attack"] * bool(attacks)
            given += ["--position-invariant"] * position_invariant
            given += ["--judge"] * bool(arguments)
            _refuse_beside_log([*(models or []), *given])
            document = api.evaluate_logs(
                from_log, retain_log=retain_log, log=log, settings=settings, require=gates, report=report
            )
        else:
            document = api.evaluate_checkpoints(
                models or [],
                **data,
                source=source,
                retain_model=retain_model,
                retain_log=retain_log,
                log=log,
                attacks=[name.strip() for names in attacks or [] for name in names.split(",")],
                judge=arguments,
                suite=suite,
                suite_dir=suite_dir,
                position_invariant=position_invariant,
                settings=settings,
                require=gates,
                device=device,
                dtype=dtype,
                batch_size=batch_size,
                report=report,
                trust_remote_code=trust_remote_code,
                progress=output,
            )
        tell(document)
    _show(output, cast(dict[str, Any], document))


def _describe() -> Describe:
    from llmsurgery.report.summary import measurement_summary

    return measurement_summary


def _refuse_beside_log(words: list[str]) -> None:
    if words:
        raise UsageError(
            f"{words[0]} does not go with --from-log",
            "the figures come from the log's own rows alone",
            f"drop {words[0]}",
        )


def _show(output: Output, document: dict[str, Any]) -> None:
    from llmsurgery.report.table import attacks_table, figures_table

    output.document(document)
    columns = {row["path"]: row["metrics"] for row in document["models"]}
    if document["source"]:
        columns = {f"{document['source']['path']} (source)": document["source"]["metrics"], **columns}
    settings = document["evaluation"]
    if suite := document.get("suite"):
        output.show(_suite_line(suite))
    output.show(
        figures_table(columns, settings["protocol"]),
        f"protocol {settings['protocol']}, truth ratios with the {settings['truth_ratio_mean']} mean: "
        "figures of another protocol do not compare",
    )
    if attacks := document.get("attacks"):
        known = f"rows that the source scores below {attacks['settings']['known']:g} are left out"
        rows = attacks["control_rows"] and f"the rows of {attacks['control_rows']} (relearn)"
        control_shown = attacks["control"] or rows or "none, so that no excess is known"
        output.show(f"control of the attacks: {control_shown}; {known}")
    for row in document["models"]:
        if quality := row["metrics"].get("forget.quality", {}).get("detail"):
            shown = f"log10 p {quality['log10_p']:.3f}, D {quality['statistic']:.4g}"
            output.show(f"forget.quality of {row['path']}: {shown}")
        if leakage := row["metrics"].get("muse.privleak", {}).get("detail"):
            shown = f"A {leakage['a']:.4f}, A_ref {leakage['a_ref']:.4f} ({leakage['reference']})"
            output.show(f"muse.privleak of {row['path']}: {shown}")
        if any(name.startswith("semeval25.") for name in row["metrics"]):
            output.show(*(f"{row['path']}: {line}" for line in _semeval_lines(row["metrics"])))
        if any(name.startswith("ort.") for name in row["metrics"]):
            output.show(
                *(f"{row['path']}: {line}" for line in _ort_lines(row["metrics"], document["suite"]["settings"]))
            )
        if "pine.order_flips" in row["metrics"]:
            output.show(f"{row['path']}: {_order_line(row['metrics'])}")
        if found := row.get("attacks"):
            output.show(attacks_table(row["path"], found), *(f"{name}: {_budget(one)}" for name, one in found.items()))
        values = " ".join(f"{name}={figure['value']}" for name, figure in row["metrics"].items())
        output.essential(f"{row['path']} {values} protocol={settings['protocol']}")


def _suite_line(suite: dict[str, Any]) -> str:
    """Name the suite with its settings, and what makes its figures differ from published ones."""
    settings = suite["settings"].items()
    parts = [f"{name} {'+'.join(value) if isinstance(value, list) else value}" for name, value in settings]
    changed = [f"{name}={value}" for name, value in suite["departures"].items()]
    departs = f"; departs from the protocol in {', '.join(changed)}" if changed else ""
    return f"suite {suite['name']} ({', '.join([suite['paper'], *parts])}){departs}"


def _semeval_lines(metrics: dict[str, Any]) -> list[str]:
    """Say what each part of the score was made of, and what a guess would reach."""
    lines = []
    tasks, membership, mmlu = (metrics.get(f"semeval25.{name}") for name in ("task_aggregate", "mia", "mmlu"))
    if tasks:
        detail = tasks["detail"]
        for split in ("forget", "retain"):
            terms = (f"{name} {one['regurgitation']:.3f}/{one['knowledge']:.3f}" for name, one in detail[split].items())
            lines.append(f"{split} regurgitation/knowledge {', '.join(terms)}")
        cut = f"{detail['shortened_prompts']} prompts shortened"
        lines.append(f"inputs as prompts, greedy, at most {detail['new_tokens']} new tokens, {cut}")
    if membership:
        detail = membership["detail"]
        counts = f"{detail['member']} members, {detail['nonmember']} others"
        cut = f"{detail['cut_documents']} cut, {detail['left_out_documents']} too short and left out"
        lines.append(f"membership AUC {detail['auc']:.4f} by mean token loss of documents: {counts}, {cut}")
    if mmlu:
        detail = mmlu["detail"]
        floor = f", {'below' if mmlu['value'] < detail['floor'] else 'not below'} the floor {detail['floor']}"
        asked = f"MMLU over {detail['subjects']} of 57 subjects without examples: chance {detail['chance']}"
        lines.append(f"{asked}{floor} of the 7B track, letters have {detail['letter_mass']:.3f} of the probability")
    dtype = next(part for part in (tasks, membership, mmlu) if part)["detail"]["dtype"]
    lines.append(f"measured in {dtype}" + ("" if dtype == "bfloat16" else ", the leaderboard in bfloat16"))
    if "semeval25.final" not in metrics:
        lines.append("no final score: it needs tasks, membership and mmlu")
    return lines


def _ort_lines(metrics: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Say which forms were asked and how, and how far the answers to each dropped."""
    forms = settings["forms"]
    cells = [figure for name, figure in metrics.items() if name.startswith("ort.") and name != "ort.form_gap"]
    cut = sum(figure["detail"]["shortened_prompts"] for figure in cells)
    asked = f"forms {', '.join(forms)}" + ("" if len(forms) == 4 else f": {len(forms)} of 4 forms of the benchmark")
    lines = [f"{asked}; geometric mean per answer token, mean over rows, {cut} prompts shortened"]
    if gap := metrics.get("ort.form_gap"):
        drops = ((form, gap["detail"]["drops"][form]) for form in forms)
        shown = ", ".join(f"{form} {'n/a' if drop is None else f'{drop:.4g}'}" for form, drop in drops)
        lines.append(f"relative drop of forget answers {shown}")
    else:
        lines.append("no form gap: it needs --source")
    return lines


def _order_line(metrics: dict[str, Any]) -> str:
    """Say what position-invariant inference tells of the order of options, and what it cannot change."""
    moved, kept = metrics["pine.order_flips"], metrics["pine.listing_flips"]
    with_letters = f"{moved['detail']['causal']:.3f} by its own attention, {moved['value']:.3f} position-invariant"
    alone = f"{metrics['mcq.listing_flips']['value']:.3f} and {kept['value']:.3f}"
    return (
        f"share of answers that change with the order of options: {with_letters}; where each option keeps its letter: "
        f"{alone}. Inference alone: no weight changes, and no checkpoint can hold it"
    )


def _budget(attack: dict[str, Any]) -> str:
    """Say what the attacker had, since a small budget makes a pass easy, and what the verdict lacks."""
    score = attack["settings"].get("score")
    parts = [f"score {score}"] if score else []
    parts.append(f"seed {attack['seed']}")
    for name, value in attack["budget"].items():
        parts.append(f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    if attack["left_out"]:
        parts.append(f"{attack['left_out']} {attack['unit']} left out, unknown to the source or known to the control")
    if rows := attack["control_rows"]:
        scores = f", {rows['before']:.3g} to {rows['after']:.3g}" if rows.get("after") is not None else ""
        parts.append(f"{rows['n']} control rows{scores}")
    return "; ".join(parts + ([attack["reason"]] if attack["reason"] else []))
