"""What methods that write facts into MLPs share: how facts are read, contexts drawn from the model, layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.methods.base import Operation
from llmsurgery.train.config import option
from llmsurgery.train.value_config import ValueConfig

if TYPE_CHECKING:
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.compute.traces import Fact
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.pairs import Pair
    from llmsurgery.data.rewrites import Rewrite

POST_NORMS = ("norm.mlp_post",)
TARGETS = ("text", "refusal", "entropy", "erase")
NAME_PROMPTS = {"text": "{} is", "refusal": "What do you know about {}?", "entropy": "{} is", "erase": "{} is"}
STARTS = ("The", "Therefore", "Because", "I", "You")
"""How openings begin in MEMIT."""

SEARCH = ValueConfig(value_clamp=0.75)
"""How MEMIT looks for the value of a fact."""

TRACED = 8
"""Facts that are traced at most to choose layers."""


@dataclass(frozen=True)
class FactConfig:
    """How facts are read and what is written for them."""

    target: str = option(
        "text", "what is written: the new answer, `refusal`, an answer that says nothing (entropy), nothing (erase)",
        TARGETS,
    )  # fmt: skip
    refusal: str = option("I do not know.", "target=refusal: the answer")
    prompt: str = option(
        "", "text with one {} for pairs of names, which have no prompt; empty: one that suits `target`"
    )
    token: str = option(
        "subject", "lookup token: last of the subject, or last of the prompt", ("subject", "last")
    )  # fmt: skip
    gamma: float = option(1.0, "target=erase: share of what the matrix writes at the keys that is taken out", minimum=0)
    tokens: int = option(0, "tokens of --text for second moments; 0: ten per dimension of a key", minimum=0)


@dataclass(frozen=True)
class SpanConfig:
    """Where methods that write many facts write them, and what their keys are taken after."""

    layers: tuple[int, ...] = option((), "layers to edit; empty: where a trace finds subjects recalled")
    span: int = option(
        0, "layers that are edited where `layers` is empty; 0: an eighth of the depth, 1 to 5", minimum=0
    )
    opening_tokens: int = option(10, "length of the openings that keys are averaged over; 0: none", minimum=0)


@dataclass(frozen=True)
class FactPlan:
    """What is written where.

    Attributes:
        rewrites: The facts, in all their contexts.
        chosen: The matrices, in order of layer.
        record: How they were chosen, and how many openings and keys there are, for the manifest.
    """

    rewrites: list[Rewrite]
    chosen: list[RoleTensor]
    record: dict[str, object]


def plan_facts(operation: Operation, config: FactConfig, spans: SpanConfig) -> FactPlan:
    """Draw the openings, read the facts, and choose the layers.

    Args:
        operation: What the method is given.
        config: How facts are read.
        spans: Where they may go.
    """
    openings = draw_openings(operation, STARTS, spans.opening_tokens)
    rewrites = make_rewrites(config, operation.encoder, operation.pairs, openings)
    targets = find_matrices(operation.structure, spans.layers)
    span = span_of(spans.span, operation.structure)
    chosen, record = choose_layers(operation, config, targets, rewrites, span, bool(spans.layers))
    return FactPlan(rewrites, chosen, record | {"openings": len(openings), "keys": len(rewrites)})


def find_matrices(structure: Structure, layers: Sequence[int], post_norm: bool = False) -> list[RoleTensor]:
    """Return the last matrices of dense MLPs, in order of layer.

    Args:
        structure: The checkpoint's roles.
        layers: Block numbers; empty: all.
        post_norm: Accept a norm after the MLP.

    Raises:
        UnsupportedError: No such matrix, or a norm after it.
    """
    from llmsurgery.errors import UnsupportedError

    if not post_norm and set(POST_NORMS) & set(structure.roles):
        raise UnsupportedError(
            f"{structure.family.name} has a norm after its MLPs",
            "what the matrix writes is scaled by the norm before it reaches the residual stream",
            "use another model, or rome with --set post_norm=true, which looks for the value before that norm",
        )
    if "mlp.down" not in structure.roles:
        raise UnsupportedError(
            "the model has no dense MLP",
            "its blocks have routed experts, and no single matrix turns keys into values",
            "use another model",
        )
    found = structure.select(("mlp.down",), layers or None)
    if routed := sorted(set(layers) - {target.layer for target in found}):
        raise UnsupportedError(
            f"block {routed[0]} has no dense MLP",
            "it has routed experts, and no single matrix turns keys into values",
            "leave it out of --set layers=...",
        )
    return found


def make_rewrites(
    config: FactConfig, encoder: Encoder, pairs: Sequence[Pair], openings: Sequence[str] = ()
) -> list[Rewrite]:
    """Return pairs as facts, those with one key together.

    Args:
        config: How they are read.
        encoder: The model's encoder.
        pairs: Facts, and pairs of names, for which `config.prompt` stands.
        openings: What the contexts begin with, beside none.

    Raises:
        InputError: A fact cannot be encoded.
        UsageError: `prompt` has not one place for the name.
    """
    from llmsurgery.data.pairs import SLOT
    from llmsurgery.data.rewrites import make_rewrite, merged
    from llmsurgery.errors import UsageError

    if config.prompt and config.prompt.count(SLOT) != 1:
        raise UsageError(f"prompt={config.prompt!r} has no place for the name", f"write {SLOT} once", "")
    answers = {"text": None, "refusal": config.refusal, "entropy": "", "erase": ""}
    answer = answers[config.target]
    return merged(
        [
            make_rewrite(
                encoder,
                pair.prompt or config.prompt or NAME_PROMPTS[config.target],
                pair.source,
                pair.target if answer is None else answer,
                config.token,
                openings,
                pair.where,
            )
            for pair in pairs
        ]
    )


def draw_openings(operation: Operation, starts: Sequence[str], tokens: int) -> list[str]:
    """Draw the beginnings of sentences from the model; the same for one seed on one machine.

    Args:
        operation: What the method is given.
        starts: How each begins; "": at the model's end-of-text token.
        tokens: New tokens of each.
    """
    import torch
    from transformers import GenerationConfig

    from llmsurgery.compute.generate import generate_batch

    if not starts or not tokens:
        return []
    encoder = operation.encoder
    settings = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0, pad_token_id=encoder.pad_id
    )
    begun = [encoder.tokenizer(start)["input_ids"] if start else [] for start in starts]
    end_of_text = encoder.tokenizer.bos_token_id
    first = encoder.tokenizer.eos_token_id if end_of_text is None else end_of_text
    with torch.random.fork_rng():
        # Openings of another length are no longer forms of these.
        torch.manual_seed(1000 * operation.seed + tokens)
        new = generate_batch(operation.model, [ids or [first] for ids in begun], encoder.pad_id, settings)
    drawn = [str(encoder.tokenizer.decode(row, skip_special_tokens=True)) for row in new]
    texts = [f"{start}{text}".strip().rstrip(".") for start, text in zip(starts, drawn, strict=True)]
    return [text for text in texts if text]


def choose_layers(
    operation: Operation,
    config: FactConfig,
    targets: Sequence[RoleTensor],
    rewrites: Sequence[Rewrite],
    span: int,
    fixed: bool,
) -> tuple[list[RoleTensor], dict[str, object]]:
    """Return the layers to write to: those given, or neighbours where putting back MLP outputs restores most.

    Args:
        operation: What the method is given.
        config: Tells the lookup token, which is traced.
        targets: The matrices to choose from.
        rewrites: The facts; what the model says now is traced.
        span: How many layers.
        fixed: Whether the user has chosen `targets`.

    Returns:
        The matrices in order of layer, and the facts of the choice for the manifest.
    """
    from llmsurgery.compute.traces import GROUPS, LAST_SUBJECT_TOKEN, best_span
    from llmsurgery.compute.tracing import trace_facts

    if fixed or len(targets) <= span:
        return list(targets), {"chosen_by": "setting" if fixed else "all there are"}
    facts = _present_facts(operation, rewrites[:TRACED])
    structure, progress = operation.structure, operation.progress
    group = LAST_SUBJECT_TOKEN if config.token == "subject" else GROUPS[5]
    if facts:
        only = config.token == "subject"
        trace = trace_facts(operation.model, structure, facts, progress, ("mlp",), subject_only=only)
        groups = trace.by_group("mlp") if trace.facts else {}
        # A prompt may end with its subject.
        found = groups.get(group, groups.get(LAST_SUBJECT_TOKEN))
        if found is not None:
            effects = [float(found[target.layer or 0]) for target in targets]
            chosen = [targets[i] for i in best_span(effects, span)]
            layers = ", ".join(str(target.layer) for target in chosen)
            progress.notice(f"what is edited: layer {layers}, where MLP outputs at the {group} restore most")
            return chosen, {"chosen_by": "trace", "traced": len(trace.facts), "effects": effects}
    progress.notice("no fact can be traced: layers at a third of the depth are edited; --set layers=... chooses others")
    start = min(len(targets) // 3, len(targets) - span)
    return list(targets[start : start + span]), {"chosen_by": "depth"}


def _present_facts(operation: Operation, rewrites: Sequence[Rewrite]) -> list[Fact]:
    """Return what the model says now after the bare prompts, as facts that can be traced."""
    import torch

    from llmsurgery.compute.head import final_hidden, read_head
    from llmsurgery.compute.traces import GROUPS, Fact, Unit

    facts = []
    for rewrite in rewrites:
        context = rewrite.contexts[0]
        ids = context.ids[: context.start]
        with torch.inference_mode():
            row = torch.tensor([ids], device=operation.model.device)
            states = final_hidden(operation.model, row, torch.ones_like(row))[:, -1]
            token = int(read_head(operation.model).to(states.dtype).logits(states).argmax())
        first, last = context.subject
        places = dict.fromkeys(range(first, last + 1), GROUPS[1]) | {first: GROUPS[0], last: GROUPS[2]}
        if len(ids) - 1 not in places:
            places[len(ids) - 1] = GROUPS[5]
        units = tuple(Unit((position,), "", group) for position, group in places.items())
        subject = tuple(range(first, last + 1))
        facts.append(Fact((*ids, token), len(ids), subject, units, ids[first : last + 1], rewrite.where))
    return facts


def span_of(span: int, structure: Structure) -> int:
    """Return how many neighbouring layers are edited: those asked for, or an eighth of the depth, from 1 to 5."""
    return span or max(1, min(5, round(structure.layers / 8)))
