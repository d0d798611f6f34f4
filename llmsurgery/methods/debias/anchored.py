"""Anchored bias: find the neuron that writes a model's favourite answer letter, and let it write something else.

Paper: "Anchored Answers: Unravelling Positional Bias in GPT-2's Multiple-Choice Questions", arXiv 2405.03205 (Findings
of ACL 2025). No training. Of the MLPs whose output at the end of the prompt reads, through the final norm and head, as
more of the favourite letter A than of the others, the last ones are looked at; of their `top` neurons by |k_n| ||v_n||
the one that pushes A the most is edited (`llmsurgery.evaluate.anchors` has the formulas).

mode=share, the default and this project's: no right answer is looked at. With delta the offsets for which every letter
is the likeliest equally often in all cyclic orders (as in `pride`), c the solution of G c = sigma delta,

    v_n += (1 / mean k_n) sum_t c_t Wc[t]

measured again and repeated up to `rounds` times; further neurons follow only if the shares are still uneven.

mode=paper, for study: v_n += sign(mean k_n) (-lambda1 Wc[A] + lambda2 Wc[C]). In the paper C is the right letter of
each single question, the row is put back after it, and only questions count whose answer is not A: that adds what is
asked for, and is no debiasing. What it does to each question is recorded under `study`; the checkpoint gets the mean
edit, and its figures are over all cyclic orders, where "always B" is worth one in n.

One row of one matrix changes; the head does not. The attention variant of the paper needs to know where the right
answer stands, and cannot be stored.

What differs from the released notebook (ruizheliUOA/Anchored_Bias_GPT2):

- All its 45 sample questions have the answer B, so that an edit to always say B scores 100%. Here every letter is right
  equally often, and the figures tell their recalls.
- It edits in the basis of a library that folds the final gain into the head and centres it; lambda1 and lambda2 mean
  another edit on raw rows. Here Wc is that basis, on raw weights.
- Its threshold of 4 on a neuron's gap is a scale of GPT-2; gap=none takes the neuron with the largest push instead.
- In gated MLPs activations can be negative: the edit follows the sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.asked import Asked
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.edits.kinds import Edit
    from llmsurgery.evaluate.anchors import LetterBasis, Neuron, Written
    from llmsurgery.evaluate.letters import LetterScores, LetterSet

POST_NORMS = ("norm.mlp_post",)
STUDIED = 32
"""Questions whose edit of their own is tried under mode=paper."""


@dataclass(frozen=True)
class AnchoredConfig:
    """Hyperparameters of the anchored-bias edit; `llmsurgery methods anchored` prints them with their help."""

    mode: str = option("share", "share: label-free offsets; paper: the right letters, for study", ("share", "paper"))
    layers: tuple[int, ...] = option((), "layers whose neurons may be edited; empty: those that push the letter")
    top: int = option(10, "neurons of a layer that are looked at, by contribution", minimum=1)
    gap: float | None = option(None, "smallest gap of a neuron, in lens logits; none: take the largest push")
    neurons: int = option(1, "neurons that are edited at most", minimum=1, maximum=3)
    rounds: int = option(3, "mode=share: edits of a neuron, each followed by a measurement", minimum=1)
    tolerance: float = option(0.02, "mode=share: largest distance of a letter's share from 1/n", minimum=0)
    lambda1: float = option(1.0, "mode=paper: how much of A is taken", minimum=0)
    lambda2: float = option(8.0, "mode=paper: how much of the right letter is added", minimum=0)
    items: int = option(24, "questions that are learnt from, in all orders; 0: all that are not held out", minimum=0)
    holdout: float = option(0.5, "share of --mcq that is measured and not learnt from", minimum=0, maximum=0.95)
    template: str = option("", "file with the prompt; default: the shipped one")
    kl_budget: float | None = option(0.05, "gate on utility.kl, nats per token; none: no gate", minimum=0)


@register
class Anchored:
    """The anchored-bias edit as a method of the toolkit."""

    spec = MethodSpec(
        name="anchored",
        task="debias",
        summary="find the neuron that writes the favourite answer letter, and take the prior of letters out of it",
        paper="Anchored Answers: Unravelling Positional Bias in GPT-2's Multiple-Choice Questions, arXiv 2405.03205",
        needs=("mcq",),
        uses=("text",),
        export="plain",
        trained=False,
        selects=True,
        roles=("mlp.down",),
        lacks=POST_NORMS,
        demo="letters",
        presets={"paper": {"mode": "paper", "gap": 4.0, "kl_budget": None}},
    )
    config_type = AnchoredConfig

    def plan(self, config: AnchoredConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices of which one column or row may change.

        Raises:
            UnsupportedError: No dense MLP, or a norm after it.
        """
        return candidates(config, structure)

    def prepare(self, config: AnchoredConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No rows are needed: questions are checked by `check_asked`."""

    def check_asked(self, config: AnchoredConfig, encoder: Encoder, given: Asked) -> None:
        """Check that every letter is a token.

        Raises:
            UnsupportedError: One is not.
        """
        from llmsurgery.methods.letter_questions import encode_given

        if given.choices is not None:
            encode_given(encoder, given.choices, config.template, 1)

    def edit(self, config: AnchoredConfig, operation: Operation, prepared: None) -> MethodResult:
        """Find the neurons and change what they write."""
        import numpy as np

        from llmsurgery.methods.letter_questions import ask_given, encode_given, named
        from llmsurgery.methods.priors import shares

        assert operation.choices is not None
        data = encode_given(operation.encoder, operation.choices, config.template, config.items)
        found = ask_given(operation, data)
        before = shares(found.log_probabilities, np.zeros(len(data.letters)))
        anchor = int(before.argmax())
        located = locate(config, operation, data, found, anchor)
        change = _paper if config.mode == "paper" else _share
        changes, ratios, facts = change(config, operation, data, found, anchor, located)
        record: dict[str, object] = {
            "letter": data.letters[anchor],
            "layer_gaps": {str(layer): gap for layer, gap in located.gaps.items()},
            "shares_before": named(data.letters, before),
            "items": len(data.questions),
            "template_sha256": data.template,
            "edited": [
                {
                    "layer": neuron.target.layer, "neuron": neuron.number, "activation": neuron.activation,
                    "gap": neuron.gap, "push": neuron.push, "norm_ratio": ratio,
                }
                for neuron, ratio in ratios
            ],
            **facts,
        }  # fmt: skip
        edits, targets = column_edits(changes)
        return MethodResult(edits, record, targets)


def candidates(config: AnchoredConfig, structure: Structure) -> list[RoleTensor]:
    """Return the last matrices of the MLPs, in order of layer.

    Raises:
        UnsupportedError: The model has no dense MLP, or a norm stands after its MLPs.
    """
    from llmsurgery.errors import UnsupportedError

    if set(POST_NORMS) & set(structure.roles):
        raise UnsupportedError(
            f"{structure.family.name} has a norm after its MLPs",
            "what a neuron writes is scaled by the norm before it reaches the residual stream",
            "use --method pride",
        )
    if "mlp.down" not in structure.roles:
        raise UnsupportedError(
            "the model has no dense MLP",
            "its blocks have routed experts, and no neuron that every prompt goes through",
            "use --method pride",
        )
    return structure.select(("mlp.down",), config.layers or None)


@dataclass(frozen=True, eq=False)
class Located:
    """What was found.

    Attributes:
        gaps: Layer -> gap.
        neurons: Neurons, the first to be edited first.
        basis: The letters' directions.
        written: What the MLPs write.
    """

    gaps: dict[int, float]
    neurons: list[Neuron]
    basis: LetterBasis
    written: Written


def main_tokens(operation: Operation, data: LetterSet, found: LetterScores) -> list[int]:
    """Return one token per letter: of the forms with and without a blank, the likelier one at the ends of prompts."""
    from llmsurgery.compute.head import read_head

    assert found.states is not None
    states = found.states.reshape(-1, found.states.shape[-1])
    head = read_head(operation.model)
    totals = [
        float((states @ head.weight[list(form)].float().cpu().T).mean()) for form in zip(*data.tokens, strict=True)
    ]
    best = max(range(len(totals)), key=totals.__getitem__)
    return [each[best] for each in data.tokens]


def locate(
    config: AnchoredConfig, operation: Operation, data: LetterSet, found: LetterScores, anchor: int
) -> Located:  # fmt: skip
    """Find the layers that push a letter, and in them the neurons.

    Raises:
        UnsupportedError: No neuron pushes the letter.
    """
    from llmsurgery.errors import UnsupportedError
    from llmsurgery.evaluate.anchors import contrast_of, find_neurons, layer_gaps, letter_basis, read_written

    model, structure = operation.model, operation.structure
    targets = candidates(config, structure)
    basis = letter_basis(model, structure, main_tokens(operation, data, found))
    chosen, rights = slots_of(data, found)
    looked = list(range(len(data.prompts)))
    contrast = contrast_of(anchor, len(data.letters))
    if config.mode == "paper":
        failing = [i for i in looked if chosen[i] == anchor != rights[i]]
        if failing:
            looked, contrast = failing, contrast_of(anchor, len(data.letters), rights[failing])
    written = read_written(model, structure, targets, [data.prompts[i] for i in looked], operation.encoder.pad_id)
    gaps = layer_gaps(model, structure, targets, written, basis, contrast)
    pushing = [target for target in reversed(targets) if gaps[target.layer or 0] > 0]
    neurons = [
        neuron
        for target in pushing or targets
        for neuron in find_neurons(model, structure, target, written, basis, contrast, config.top)
    ]
    least = 0.0 if config.gap is None else config.gap
    kept = [neuron for neuron in neurons if neuron.gap > least and neuron.push > 0]
    if config.gap is None:
        kept.sort(key=lambda neuron: -neuron.push)
    if not kept:
        raise UnsupportedError(
            f"no neuron writes the letter {data.letters[anchor]}",
            f"of {len(neurons)} that were looked at none has a gap above {least:g} and pushes it",
            "use --method pride, other layers, or a lower --set gap=...",
        )
    return Located(gaps, kept, basis, written)


def slots_of(
    data: LetterSet, found: LetterScores
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:  # fmt: skip
    """Return the letter that is chosen and the one that is right of every prompt."""
    import numpy as np

    orders = np.arange(len(data.letters))
    rights = (data.answers[:, None] - orders[None, :]) % len(orders)
    return found.log_probabilities.argmax(-1).reshape(-1), rights.reshape(-1)


Changes = dict[tuple["RoleTensor", int], "torch.Tensor"]
"""(matrix, neuron) -> what is added to the vector that it writes, before rounding."""


def _share(
    config: AnchoredConfig, operation: Operation, data: LetterSet, found: LetterScores, anchor: int, located: Located
) -> tuple[Changes, list[tuple[Neuron, float]], dict[str, object]]:
    """Take the prior out of one neuron after the other until the shares of the letters are even."""
    import numpy as np

    from llmsurgery.evaluate.anchors import offset_vector, vectors_of, write_vector
    from llmsurgery.methods.letter_questions import ask_given, named
    from llmsurgery.methods.priors import share_offsets, shares

    zero, scores = np.zeros(len(data.letters)), found.log_probabilities
    uneven = float(np.abs(shares(scores, zero) - 1 / len(zero)).max())
    scale = located.written.scale(located.basis.mean_free)
    changes: Changes = {}
    tried: list[dict[str, object]] = []
    ratios: list[tuple[Neuron, float]] = []
    for neuron in located.neurons[: config.neurons]:
        original = vectors_of(operation.model, neuron.target)[neuron.number].clone()
        best, current, gain = original, original, 1.0
        for _ in range(config.rounds):
            if uneven <= config.tolerance:
                break
            # Later blocks and the final norm damp or amplify what is written: the offsets still missing, and the
            # share of the last ones that arrived, are measured and not assumed.
            wanted = share_offsets(scores)
            current = current + gain * offset_vector(located.basis, wanted, scale) / neuron.activation
            write_vector(operation.model, neuron.target, neuron.number, current)
            after = ask_given(operation, data, keep_states=False).log_probabilities
            gain /= arrived(after - scores, wanted)
            scores = after
            found_shares = shares(scores, zero)
            distance = float(np.abs(found_shares - 1 / len(zero)).max())
            tried.append({"neuron": neuron.number, "shares": named(data.letters, found_shares)})
            if distance < uneven:
                best, uneven = current, distance
        write_vector(operation.model, neuron.target, neuron.number, best)
        if best is not original:
            changes[neuron.target, neuron.number] = best - original
            ratios.append((neuron, float(best.norm() / original.norm())))
    return changes, ratios, {"tried": tried, "unevenness": uneven}


def arrived(change: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]) -> float:
    """Return the share of offsets that a change of scores [items, orders, letters] brought, from .2 to 5."""
    mean = change.mean((0, 1))
    share = float((mean - mean.mean()) @ wanted) / max(float(wanted @ wanted), 1e-12)
    return min(max(share, 0.2), 5.0)


def _paper(
    config: AnchoredConfig, operation: Operation, data: LetterSet, found: LetterScores, anchor: int, located: Located
) -> tuple[Changes, list[tuple[Neuron, float]], dict[str, object]]:
    """Return the mean of the paper's edits of single questions, and what each of them does to its own."""
    import torch

    from llmsurgery.evaluate.anchors import vectors_of, write_vector

    operation.progress.notice(
        "mode=paper adds the right letter of the questions that fail: `study` shows what that does to each of them, "
        "and is no evidence of less bias; the figures over all cyclic orders are"
    )
    neuron = located.neurons[0]
    chosen, rights = slots_of(data, found)
    failing = [i for i in range(len(rights)) if chosen[i] == anchor != rights[i]]
    centred, sign = located.basis.centred, 1.0 if neuron.activation > 0 else -1.0
    original = vectors_of(operation.model, neuron.target)[neuron.number].clone()

    def update(weights: torch.Tensor) -> torch.Tensor:
        return sign * (config.lambda2 * (weights @ centred) - config.lambda1 * centred[anchor])

    hits = 0
    studied = failing[:STUDIED]
    for i in studied:
        own = torch.zeros(len(data.letters), dtype=torch.float64)
        own[rights[i]] = 1.0
        write_vector(operation.model, neuron.target, neuron.number, original + update(own))
        hits += answered(operation, data, i) == int(rights[i])
    mean = torch.zeros(len(data.letters), dtype=torch.float64)
    for i in failing:
        mean[rights[i]] += 1 / len(failing)
    change = update(mean)
    write_vector(operation.model, neuron.target, neuron.number, original + change)
    study = {"failing": len(failing), "studied": len(studied), "fixed": hits}
    ratio = float((original + change).norm() / original.norm())
    return {(neuron.target, neuron.number): change}, [(neuron, ratio)], {"study": study}


def answered(operation: Operation, data: LetterSet, prompt: int) -> int:
    """Return the letter that the model as it is gives to one prompt."""
    import torch

    from llmsurgery.compute.head import read_head
    from llmsurgery.evaluate.letters import last_states, letter_log_probabilities

    with torch.inference_mode():
        states = last_states(operation.model, [data.prompts[prompt]], operation.encoder.pad_id)
        return int(letter_log_probabilities(states, read_head(operation.model), data.tokens)[0].argmax())


def column_edits(changes: Changes) -> tuple[list[Edit], list[RoleTensor]]:
    """Return one low-rank edit for each matrix with a changed neuron."""
    import numpy as np

    from llmsurgery.edits.kinds import LowRank

    edits: list[Edit] = []
    targets = list(dict.fromkeys(target for target, _ in changes))
    for target in targets:
        own = [(number, change.numpy()) for (of, number), change in changes.items() if of is target]
        width = target.shape[0 if target.transposed else 1]
        places = np.zeros((width, len(own)))
        for column, (number, _) in enumerate(own):
            places[number, column] = 1.0
        vectors = np.stack([change for _, change in own], 1)
        left, right = (places, vectors.T) if target.transposed else (vectors, places.T)
        edits.append(LowRank(target.stored, left, right))
    return edits, targets
