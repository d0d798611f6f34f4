"""`eval --attack`: attacks on the source, the control and every edited model, and what they say."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from llmsurgery import __version__
from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import require_text_model
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.progress import Progress
from llmsurgery.data.records import Row
from llmsurgery.errors import UsageError, unknown_name
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.gates import Gate
from llmsurgery.evaluate.robustness.base import Attack, AttackConfig, Trial
from llmsurgery.evaluate.robustness.registry import all_attacks, find_attack
from llmsurgery.methods.settings import as_record, resolve_config
from llmsurgery.run.encoding import encode_for_figures, make_encoder, require_known_tokens
from llmsurgery.run.files import CONTROL
from llmsurgery.run.fitting import scoring_rows
from llmsurgery.run.manifest import finite
from llmsurgery.run.request import EvaluationRequest
from llmsurgery.run.source import stored_dtype, tensor_reader

if TYPE_CHECKING:
    from llmsurgery.evaluate.intervals import Figure
    from llmsurgery.evaluate.robustness.bench import Bench
    from llmsurgery.evaluate.robustness.verdict import Judgement

PREFIX = "attack."


@dataclass(frozen=True)
class AttackPlan:
    """Attacks with their resolved settings.

    Attributes:
        shared: What all of them share.
        attacks: Attack and its settings, in the order given.
    """

    shared: AttackConfig
    attacks: Sequence[tuple[Attack, object]]

    @property
    def needs(self) -> set[str]:
        """What gates may refer to because of these attacks."""
        return {f"attack:{attack.spec.name}" for attack, _ in self.attacks}

    def check(self, rows: Mapping[str, Sequence[Row]]) -> None:
        """Raise every error about the attacks' data, before any model is loaded."""
        from llmsurgery.evaluate.robustness.control import check_control

        if CONTROL in rows and not any(attack.spec.control_rows for attack, _ in self.attacks):
            able = ", ".join(name for name, attack in all_attacks().items() if attack.spec.control_rows)
            raise UsageError(
                "--control is given without an attack that scores it",
                f"its rows stand for a control model under --attack {able}",
                "drop --control",
            )
        check_control(rows)
        for attack, config in self.attacks:
            for name in attack.spec.needs:
                if name not in rows:
                    raise UsageError(
                        f"--attack {attack.spec.name} needs --{name}", attack.spec.summary, f"give --{name} DATA"
                    )
            attack.check(config, rows)


def split_settings(settings: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Return the settings of the figures, and those of attacks without their prefix."""
    attacking = {name.removeprefix(PREFIX): value for name, value in settings.items() if name.startswith(PREFIX)}
    return {name: value for name, value in settings.items() if not name.startswith(PREFIX)}, attacking


def plan_attacks(request: EvaluationRequest) -> AttackPlan:
    """Resolve names and settings of the attacks.

    Raises:
        UsageError: An unknown attack or setting, settings of an attack that is not asked for, or data that all
            attacks need is missing.
    """
    attacks = [find_attack(name) for name in request.attacks]
    for option, given in (("--forget", "forget" in request.data), ("--source", request.source is not None)):
        if attacks and not given:
            raise UsageError(
                f"--attack needs {option}",
                "an attack tries to bring back what the source knew of the forget rows",
                f"give {option}, or drop --attack",
            )
    shared, own = _by_attack(split_settings(request.settings)[1], [attack.spec.name for attack in attacks])
    preset = {"preset": shared.pop("preset")} if "preset" in shared else {}
    config: AttackConfig = resolve_config(AttackConfig, shared, prefix=PREFIX)
    plan = []
    for attack in attacks:
        name, presets = attack.spec.name, {"quick": {}, **attack.spec.presets}
        chosen = {**preset, **own[name]}
        plan.append((attack, resolve_config(attack.config_type, chosen, presets, f"{PREFIX}{name}.")))
    return AttackPlan(config, plan)


def _by_attack(
    settings: Mapping[str, object], names: Sequence[str]
) -> tuple[dict[str, object], dict[str, dict[str, object]]]:  # fmt: skip
    shared: dict[str, object] = {}
    own: dict[str, dict[str, object]] = {name: {} for name in names}
    for name, value in settings.items():
        attack, dot, rest = name.partition(".")
        if not dot:
            if not names:
                raise UsageError(
                    f"{PREFIX}{name} is set without an attack", "no --attack is given", "give --attack NAME"
                )
            shared[name] = value
        elif attack in own:
            own[attack][rest] = value
        elif attack in all_attacks():
            raise UsageError(f"{PREFIX}{name} is set without --attack {attack}", "it would do nothing", "drop it")
        else:
            raise unknown_name("attack", attack, all_attacks(), f"--set {PREFIX}ATTACK.NAME=VALUE")
    return shared, own


def refuse_relative(gates: Sequence[Gate]) -> None:
    """Refuse gates that compare the figure of an attack with the one before: it compares already."""
    for gate in gates:
        if gate.relative and gate.metric.startswith(PREFIX):
            raise UsageError(
                f"gate {gate} has no value before",
                "attacks are compared with the source in recovery and retention",
                f"{gate.metric}{gate.operator}0.2, say",
            )


def run_attacks(
    plan: AttackPlan,
    models: Sequence[Checkpoint],
    source: Checkpoint | None,
    control: Checkpoint | None,
    rows: Mapping[str, Sequence[Row]],
    config: EvaluationConfig,
    request: EvaluationRequest,
    progress: Progress,
) -> list[dict[str, Judgement]]:
    """Run every attack on the source, the control and every model.

    Args:
        plan: The attacks; without any, nothing is done.
        models: Edited models.
        source: The model before surgery; None only without attacks.
        control: A model that never saw the forget rows, or None.
        rows: Data name -> rows.
        config: Settled evaluation settings.
        request: Device, dtype, trust, and whether rows per forward halve when memory runs out.
        progress: Told of long work and notices.

    Returns:
        Per model: attack name -> judgement.
    """
    from llmsurgery.compute.device import repeatable_kernels, resolve_device

    if not plan.attacks or source is None:
        return [{} for _ in models]
    if control is None and not (CONTROL in rows and all(attack.spec.control_rows for attack, _ in plan.attacks)):
        progress.notice(
            "attacks have no control: --retain-model MODEL, one that never saw the forget rows, is missing; for "
            "relearn --control DATA, rows that the source does not know, can stand for it"
        )

    def attack_all(size: int) -> list[dict[str, Judgement]]:
        own = dataclasses.replace(config, batch_size=size)

        def attacked(place: Checkpoint, before: Mapping[str, Trial] | None) -> dict[str, Trial]:
            bench = make_bench(plan, place, source, rows, own, request, progress)
            return _attack_one(plan, bench, before)

        first = attacked(source, None)
        other = {} if control is None else attacked(control, first)
        return [_judge(plan, attacked(model, first), first, other) for model in models]

    with repeatable_kernels(resolve_device(request.device)):
        return scoring_rows(config, request.batch_size, progress).run(attack_all)


def _attack_one(plan: AttackPlan, bench: Bench, first: Mapping[str, Trial] | None) -> dict[str, Trial]:
    from llmsurgery.compute.device import set_seeds

    trials = {}
    for attack, settings in plan.attacks:
        name = attack.spec.name
        # The same seeds for every model: the control undergoes the same attack.
        set_seeds(plan.shared.seed)
        trials[name] = attack.run(settings, bench, None if first is None else first[name])
    return trials


def _judge(
    plan: AttackPlan, edited: Mapping[str, Trial], source: Mapping[str, Trial], control: Mapping[str, Trial]
) -> dict[str, Judgement]:
    from llmsurgery.evaluate.robustness.verdict import judge_attack

    found = {}
    for attack, _ in plan.attacks:
        name = attack.spec.name
        trials = (edited[name], source[name], control.get(name))
        found[name] = judge_attack(*trials, plan.shared.known, attack.compare(*trials), attack.spec.only_told)
    return found


def make_bench(
    plan: AttackPlan,
    checkpoint: Checkpoint,
    source: Checkpoint,
    rows: Mapping[str, Sequence[Row]],
    config: EvaluationConfig,
    request: EvaluationRequest,
    progress: Progress,
) -> Bench:
    """Put a model on the bench; it is loaded when first used."""
    from transformers import PreTrainedModel

    from llmsurgery.compute.device import resolve_device, resolve_dtype
    from llmsurgery.compute.load import load_model
    from llmsurgery.evaluate.robustness.bench import Bench, take_rows

    encoder = make_encoder(checkpoint)
    chosen = take_rows(rows, plan.shared.rows, plan.shared.retain_rows)
    whole = dataclasses.replace(config, rows=0)
    data = encode_for_figures(encoder, {**chosen, "text": rows["text"]}, whole)
    structure = detect(checkpoint.config, checkpoint.tensors)
    require_text_model(structure, "an attack")
    require_known_tokens(data, structure)
    device = resolve_device(request.device)
    dtype = resolve_dtype(request.dtype, stored_dtype(checkpoint), device)

    def load() -> PreTrainedModel:
        return load_model(checkpoint.root, dtype, device, request.trust_remote_code, structure.family.buffers)

    return Bench(
        structure,
        tensor_reader(checkpoint),
        tensor_reader(source),
        source.tensors.keys(),
        encoder,
        data,
        config,
        plan.shared.seed,
        progress,
        load,
    )


def attack_figures(found: Mapping[str, Judgement]) -> dict[str, Figure]:
    """Return the figures of the attacks on one model by metric name."""
    return {f"{PREFIX}{name}.{key}": figure for name, one in found.items() for key, figure in one.figures.items()}


def add_attacks(
    document: dict[str, object],
    plan: AttackPlan,
    attacked: Sequence[Mapping[str, Judgement]],
    request: EvaluationRequest,
) -> None:
    """Add to the document of `eval` what the attacks share, and to each model their scores, controls and verdicts."""
    import torch
    import transformers

    versions = {"llmsurgery": __version__, "python": platform.python_version()}
    versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
    document["attacks"] = {
        "settings": as_record(plan.shared),
        "control": request.retain_model,
        "control_rows": request.data.get(CONTROL),
        "versions": versions,
    }
    for record, found in zip(cast(list[dict[str, object]], document["models"]), attacked, strict=True):
        record["attacks"] = {
            attack.spec.name: _plain(
                {
                    "name": attack.spec.name,
                    **found[attack.spec.name].record,
                    "unit": attack.spec.unit,
                    "seed": plan.shared.seed,
                    "settings": as_record(settings),
                }
            )
            for attack, settings in plan.attacks
        }


def _plain(value: object) -> object:
    """Return JSON values all the way down, null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return finite(value)
