"""The work behind FakeLN: windows of the corpus, training with and without norms, and edits that store the result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmsurgery.errors import UnsupportedError
from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.train.config import TrainingConfig

if TYPE_CHECKING:
    from llmsurgery.arch.spec import Structure
    from llmsurgery.compute.fake_norms import FakeNorms
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.edits.kinds import Edit
    from llmsurgery.methods.norm_folding import Folded
    from llmsurgery.methods.remove_layernorm.fakeln import FakelnConfig
    from llmsurgery.train.norm_removal import Removal
    from llmsurgery.train.norm_schedule import Event

SIDECAR = "layernorm.json"
"""File beside the result with the constants of all norms, and how they came about."""


@dataclass(frozen=True)
class Corpus:
    """Windows of equal length: those that are trained on, and those that are only measured."""

    train: Sequence[Encoded]
    held: Sequence[Encoded]


def require_supported(spec: MethodSpec, structure: Structure) -> None:
    """Refuse models whose norms cannot all be constants.

    Raises:
        UnsupportedError: Names the role.
    """
    present = set(structure.roles)
    if not set(spec.roles) & present:
        raise UnsupportedError(
            f"a {structure.family.name} model has no norm before attention",
            "its norms stand behind the sublayers, where none of this was tried",
            "use another model",
        )
    if found := [role for role in spec.lacks if role in present]:
        what = "routed experts" if found[0] == "router" else f"norms inside attention ({found[0]})"
        raise UnsupportedError(
            f"this {structure.family.name} model has {what}",
            "removal is for GPT-2 and GPT-NeoX, and as an experiment for dense RMSNorm models",
            "--method fold folds its gains, without training",
        )


def cut_corpus(config: FakelnConfig, encoder: Encoder, rows: Sequence[Row]) -> Corpus:
    """Cut the corpus into windows; the last tenth of them, `held` at most, is only measured.

    Of a single window nothing can be held back: it is trained on and measured.

    Raises:
        InputError: The corpus has fewer tokens than one window.
    """
    from llmsurgery.data.chat import Encoded
    from llmsurgery.data.windows import pack_windows

    count = (config.max_steps or 0) * config.batch_size + config.held
    windows = pack_windows(encoder, rows, min(config.window, encoder.max_length), count, "corpus")
    encoded = [Encoded(window, 1, False, f"window {number + 1} of --corpus") for number, window in enumerate(windows)]
    held = min(config.held, max(1, len(encoded) // 10))
    if len(encoded) == 1:
        return Corpus(encoded, encoded)
    return Corpus(encoded[:-held], encoded[-held:])


def remove_norms(config: FakelnConfig, operation: Operation, corpus: Corpus, events: Sequence[Event]) -> MethodResult:
    """Train with the norms going one after the other, and return the edits that store the result."""
    from llmsurgery.compute.fake_norms import FakeNorms
    from llmsurgery.methods.norm_result import probe_ids, probe_logits, require_linear, tell_of_difference

    structure, session = operation.structure, operation.training
    _tell(config, operation, corpus)
    assert config.lr_end is not None
    session.lr_end = config.lr_end
    losses = {"source": _mean(_score(operation, corpus))}
    losses["at_once"] = _mean(_score(operation, corpus, at_once=True))
    if config.control:
        losses["control"] = _train(config, operation, corpus, ()).loss
    norms = FakeNorms(operation.model, structure, operation.encoder.end_id, config.special_first == "position")
    ids = probe_ids(operation)
    with norms.attached():
        made = _train(config, operation, corpus, events, norms)
        losses["result"] = made.loss
        logits = probe_logits(operation.model, ids)
    folded = _stored_form(config, structure, made.values, norms)
    edits = _edits(config, operation, made.values, folded)
    largest = max(float(abs(values).max()) for values in folded.values.values())

    def check(model: Any) -> None:
        require_linear(model, structure)
        tell_of_difference(operation, model, ids, logits, "the model in training", largest)

    sigmas = constants(norms)
    record: dict[str, object] = {
        **made.record,
        "losses": losses,
        "sigma": sigmas,
        "first_over_rest": {"before": made.ratios[0], "after": made.ratios[1]},
        "windows": {"train": len(corpus.train), "held": len(corpus.held), "tokens": len(corpus.train[0].ids)},
    }
    return MethodResult(edits, record, beside={SIDECAR: _sidecar(config, norms, made)}, check=check)


@dataclass(frozen=True)
class Trained:
    """What one training left.

    Attributes:
        loss: Cross-entropy of the held windows, nats per token.
        values: Stored name -> trained values.
        record: Facts for the manifest.
        removal: The loss, with the history of the constants.
        ratios: Largest spread of the first position over that of the others, over the norms, before and after.
    """

    loss: float
    values: Mapping[str, Any]
    record: Mapping[str, object]
    removal: Removal
    ratios: tuple[float, float]


def _train(
    config: FakelnConfig,
    operation: Operation,
    corpus: Corpus,
    events: Sequence[Event],
    norms: FakeNorms | None = None,
) -> Trained:
    """Train all weights from the stored ones; without events as ever, for the control."""
    import torch

    from llmsurgery.compute.device import set_seeds
    from llmsurgery.compute.fake_norms import FakeNorms
    from llmsurgery.edits.kinds import Replace
    from llmsurgery.train.loop import train
    from llmsurgery.train.norm_removal import Removal, RemovalSettings, window_losses
    from llmsurgery.train.scorer import Scorer
    from llmsurgery.train.trainable import prepare_trainable

    session, structure, model = operation.training, operation.structure, operation.model
    training = _training(config)
    # Both trainings draw the same.
    set_seeds(operation.seed)
    with prepare_trainable(model, structure.select(("all",)), training, operation.read) as trainable:
        scorer = Scorer(trainable, operation.encoder.pad_id)
        own = norms or FakeNorms(model, structure, operation.encoder.end_id)
        sample = torch.tensor([corpus.train[0].ids], device=model.device)
        before = own.measure(sample)
        own.state.sigma.copy_(before)
        assert config.aux is not None
        assert config.momentum is not None
        assert config.max_steps is not None
        settings = RemovalSettings(config.aux if events else 0.0, config.momentum, config.max_rise, config.max_steps)
        removal = Removal(scorer, own, corpus.train, events, settings, session)
        result = train(trainable, removal, len(corpus.train), training, session, removal.begin)
        removal.finish()
        loss = _mean(window_losses(scorer, norms, corpus.held, _rows(operation)))
        after = own.measure(sample)
        values = {edit.name: edit.values for edit in trainable.edits() if isinstance(edit, Replace)}
    ratios = tuple(float((spreads[:, 1] / spreads[:, 0]).max()) for spreads in (before, after))
    return Trained(loss, values, result.record(), removal, (ratios[0], ratios[1]))


def _training(config: FakelnConfig) -> TrainingConfig:
    """Return the hyperparameters of training as the loop takes them."""
    assert config.max_steps is not None
    assert config.warmup_steps is not None
    return TrainingConfig(
        train="full",
        roles=("all",),
        optimizer=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        max_steps=config.max_steps,
        batch_size=config.batch_size,
        schedule="cosine",
        warmup_steps=min(config.warmup_steps, config.max_steps // 4),
        clip=config.clip,
        gradient_checkpointing=config.gradient_checkpointing,
        save_every=config.save_every,
    )


def _rows(operation: Operation) -> int:
    return operation.training.micro_batch or 4


def _score(operation: Operation, corpus: Corpus, at_once: bool = False) -> list[float]:
    """Return the losses of the source on the held windows; with all norms switched at once, if that is asked for."""
    import torch

    from llmsurgery.compute.fake_norms import FakeNorms
    from llmsurgery.train.norm_removal import window_losses
    from llmsurgery.train.scorer import Scorer
    from llmsurgery.train.trainable import Trainable

    scorer = Scorer(Trainable(operation.model, [], None, list, None), operation.encoder.pad_id)
    if not at_once:
        return window_losses(scorer, None, corpus.held, _rows(operation))
    norms = FakeNorms(operation.model, operation.structure, operation.encoder.end_id)
    norms.state.sigma.copy_(norms.measure(torch.tensor([corpus.train[0].ids], device=operation.model.device)))
    norms.state.fake.fill_(True)
    with norms.attached():
        return window_losses(scorer, norms, corpus.held, _rows(operation))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def constants(norms: FakeNorms) -> dict[str, float]:
    """Return the constant of every norm by its name."""
    return {norm.name: float(norms.state.sigma[number, 0]) for number, norm in enumerate(norms.norms)}


def _stored_form(config: FakelnConfig, structure: Structure, values: Mapping[str, Any], norms: FakeNorms) -> Folded:
    from llmsurgery.methods.norm_folding import constant_norms, folded_constants

    make = folded_constants if config.form == "folded" else constant_norms
    return make(structure, values.__getitem__, constants(norms), config.scale)


def _edits(config: FakelnConfig, operation: Operation, values: Mapping[str, Any], folded: Folded) -> list[Edit]:
    """Return the trained values, those of the stored form in their place, and the epsilon."""
    import numpy as np

    from llmsurgery.edits.kinds import Config, Replace

    edits: list[Edit] = [Replace(name, folded.values.get(name, made)) for name, made in values.items()]
    edits = [
        Replace(edit.name, np.asarray(edit.values, dtype=np.float32)) if isinstance(edit, Replace) else edit
        for edit in edits
    ]
    edits.append(Config(("config.json", operation.structure.family.norm_eps), config.scale**2))
    return edits


def _sidecar(config: FakelnConfig, norms: FakeNorms, made: Trained) -> bytes:
    """Return the constants, and what they were at every step, as JSON."""
    from llmsurgery.train.norm_removal import thrown_steps

    history = made.removal.history[: int(made.removal.steps)].tolist()
    document = {
        "form": config.form,
        "scale": config.scale,
        "sigma": constants(norms),
        "events": thrown_steps(made.removal),
        "history": {
            "norms": [norm.name for norm in norms.norms],
            "sigma": [[float(f"{value:.6g}") for value in row] for row in history],
        },
    }
    return (json.dumps(document) + "\n").encode()


def _tell(config: FakelnConfig, operation: Operation, corpus: Corpus) -> None:
    """Say what is experimental, and what the data do not give."""
    progress = operation.progress
    if not operation.structure.family.norm_centres:
        progress.notice(
            "experimental: no published result removes RMSNorm; the first token's massive activations are the "
            "obstacle, so compare the losses before you trust the result"
        )
    if config.pace is not None and config.pace < 1:
        progress.notice(f"the schedule runs at {config.pace:g} of the paper's steps, to end within {config.max_steps}")
    if corpus.train is corpus.held:
        progress.notice("--corpus is a single window: it is trained on and measured")
    assert config.max_steps is not None
    seen = config.max_steps * min(config.batch_size, len(corpus.train))
    if seen > 4 * len(corpus.train):
        progress.notice(
            f"--corpus gives {len(corpus.train)} windows for {config.max_steps} steps of {config.batch_size}: each is "
            f"read {seen / len(corpus.train):.0f} times"
        )
    progress.notice(
        "the result is not to be trained any further as it is: its gains are millions of times those of the source"
    )
