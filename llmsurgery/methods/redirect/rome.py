"""ROME: write a new answer into one MLP matrix, at the key of a subject.

Paper: "Locating and Editing Factual Associations in GPT", arXiv 2202.05262, in the form of r-ROME ("Rebuilding ROME",
arXiv 2403.07175). With W the last matrix of one block's MLP, k its input at the subject's last token, mean over the
bare prompt and sampled openings before it, C = E[k k^T] over ordinary text, and v the value that makes the model give
the new answer (`llmsurgery.train.target_value`):

    u = C^-1 k,    W += (v - W k) u^T / (u^T k)

W k = v then holds exactly, and of all such changes this one moves what W does on ordinary text least. Several facts are
written at once, each exactly: W += R (K^T C^-1 K)^-1 K^T C^-1 with R = V - W K. Facts with one and the same key, such
as two prompts that begin with their subject, share one value, which is looked for in the contexts of all of them.

What is written (`target`): the new answer; a refusal; the value at which the answer's distribution has the highest
entropy; or, without any search, R = -gamma W K, which erases what W writes for these keys.

What differs from the released code (kmeng01/rome), and why:

- It takes u from the mean key, but numerator and denominator from the bare prompt's. A small denominator then makes
  huge updates, which break models in long runs. Here the mean key stands everywhere; authors_compat=true is theirs.
- It writes facts one after the other, so that later ones move earlier ones. Here all hold at once.
- It averages the second moment over 100,000 Wikipedia samples that it downloads. Here --text is taken, ten tokens per
  dimension; below that, 1e-4 of the mean diagonal is added, and keys that text did not reach look free.
- Its layers are constants per model. Here the layer where the subject's MLP outputs restore most in a causal trace is
  taken. That does not predict the best layer reliably (arXiv 2301.04213): compare layers where it matters.
- It draws openings from the end-of-text token. Chat models begin a turn there: theirs begin with "The", "I" and so on.
- The bias of the matrix, which is part of v, is taken off before W is solved for.

Where the first attention layers carry the subject on to the last token, as in small models, its own token is read no
more: write at token=last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.concepts import layer_of
from llmsurgery.methods.facts import (
    STARTS,
    FactConfig,
    choose_layers,
    draw_openings,
    find_matrices,
    make_rewrites,
)
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option
from llmsurgery.train.value_config import ValueConfig

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.pairs import Pair
    from llmsurgery.data.records import Row
    from llmsurgery.data.rewrites import Rewrite


@dataclass(frozen=True)
class RomeConfig:
    """Hyperparameters of ROME; `llmsurgery methods rome` prints them with their help."""

    layers: tuple[int, ...] = option((), "the layer to edit; empty: where a trace finds the subject recalled")
    whiten: bool = option(True, "weigh keys by the second moment of ordinary text; false: the smallest change of W")
    openings: int = option(
        10, "sampled openings of each length in opening_tokens that keys are averaged over", minimum=0
    )
    opening_tokens: tuple[int, ...] = option((5, 10), "lengths of sampled openings")
    authors_compat: bool = option(False, "divide by the bare prompt's key, as the released code does")
    post_norm: bool = option(False, "edit models with a norm after the MLP; the value is looked for before it")
    facts: FactConfig = field(default_factory=FactConfig)
    search: ValueConfig = field(default_factory=ValueConfig)


@register
class Rome:
    """ROME as a method of the toolkit."""

    spec = MethodSpec(
        name="rome",
        task="redirect",
        summary="write a new answer, a refusal or nothing at a subject's key in one MLP matrix, rank one per fact",
        paper="Locating and Editing Factual Associations in GPT, arXiv 2202.05262; Rebuilding ROME, arXiv 2403.07175",
        needs=("pairs",),
        export="plain",
        trained=False,
        selects=True,
        roles=("mlp.down",),
        lacks=("norm.mlp_post",),
        presets={"released": {"authors_compat": True}},
    )
    config_type = RomeConfig

    def plan(self, config: RomeConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices that may be written; one of them is.

        Raises:
            UnsupportedError: No dense MLP, or a norm after it.
            UsageError: More than one layer is given.
        """
        from llmsurgery.errors import UsageError

        if len(config.layers) > 1:
            raise UsageError(
                f"rome edits one layer, not {len(config.layers)}", "all of a value is written there", "use memit"
            )
        return find_matrices(structure, config.layers, config.post_norm)

    def prepare(self, config: RomeConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No rows are needed: pairs are checked by `check_pairs`."""

    def check_pairs(self, config: RomeConfig, encoder: Encoder, pairs: Sequence[Pair]) -> None:
        """Check that every fact can be encoded.

        Raises:
            InputError: A subject or answer without tokens of its own.
        """
        make_rewrites(config.facts, encoder, pairs)

    def edit(self, config: RomeConfig, operation: Operation, prepared: None) -> MethodResult:
        """Choose the layer, look for the values, and write them."""
        from llmsurgery.methods.fact_figures import answer_figures, neighbour_answers, report
        from llmsurgery.methods.fact_writing import as_edit, write_update

        # After the end of a text, chat models begin a turn and no sentence.
        words = STARTS if operation.encoder.tokenizer.chat_template else ("",)
        starts = [words[number % len(words)] for number in range(config.openings)]
        openings = [text for tokens in config.opening_tokens for text in draw_openings(operation, starts, tokens)]
        rewrites = make_rewrites(config.facts, operation.encoder, operation.pairs, openings)
        targets = find_matrices(operation.structure, config.layers, config.post_norm)
        chosen, record = choose_layers(operation, config.facts, targets, rewrites, 1, bool(config.layers))
        (target,) = chosen
        before = (answer_figures(operation, config.facts), neighbour_answers(operation))
        factors, keys, residuals, found = _update(config, operation, target, rewrites)
        _, written = write_update(operation, target, factors, keys, residuals)
        record |= {"openings": len(openings), "keys": len(rewrites), "edited": [written | found]}
        return MethodResult([as_edit(target, factors)], record | report(operation, config.facts, before), chosen)


def _update(
    config: RomeConfig, operation: Operation, target: RoleTensor, rewrites: Sequence[Rewrite]
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor, dict[str, object]]:
    """Return the factors, the keys and residuals that they were made for, and the facts of them."""
    import torch

    from llmsurgery.compute.associative import insert_factors
    from llmsurgery.methods.fact_writing import bias_of, find_values, inverse_of, read_keys, written_now

    contexts = len(rewrites[0].keys)
    means, bare = read_keys(operation, target, rewrites, 1 / contexts)
    read = bare if config.authors_compat else means
    now = written_now(operation, target, read)
    found: dict[str, object] = {}
    if config.facts.target == "erase":
        residuals = -config.facts.gamma * now
    else:
        values, searches = find_values(operation, config.facts, config.search, rewrites, "mlp", layer_of(target))
        residuals = values - bias_of(operation, target) - now
        found["values"] = searches
    solve, statistics = inverse_of(operation, config.facts, target) if config.whiten else (torch.Tensor.double, {})
    solved = solve(means)
    factors = insert_factors(means, residuals, lambda _: solved, None, read)
    return factors, read, residuals, {"denominator": (solved * read).sum(0).tolist(), **statistics, **found}
