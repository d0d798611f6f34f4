"""TARS: turn the MLP rows that point to a concept the other way, so that it is no longer brought up.

Paper: "Targeted Angular Reversal of Weights (TARS) for Knowledge Removal in Large Language Models", arXiv 2412.10257.
Only its abstract was at hand: what it leaves open is an option here, and no setting is claimed to be the paper's. No
training, no data but the concept's name, and better, prompts whose next word it is.

    v       final hidden state (after the norm) at the end of prompts that the concept follows, mean over them
    refine  v until p = softmax(W_head v)[t] reaches p_stop, t the first token of the concept after the prompt:
            head    v + a (W_head[t] - mean row), the smallest a that reaches it
            noise   v + sigma |v| / sqrt(d) eps, eps ~ N(0, I), kept where p rises
    centre  v - m, m the mean final state over the ordinary text of --text (centre=false: v)
    rows    of up and gate in all layers, by cos(w, v); the largest n_edits are changed:
            reverse  w := -|w| v / |v|     the neuron then writes the opposite of what it wrote
            zero     w := 0                it writes nothing, or in a gate act(0) times what up says
            project  w := w - (w.v) v / |v|^2

Centring departs from the paper as far as it is known. Most of a final state is what all of them share; the rows nearest
to it serve every text, and turning them harms every text.

Reversing gate and up of one neuron together switches it off instead; the record says where that happened. Reversal is
stronger than removal: the model may avoid the concept even where the prompt asks to repeat it.

n_edits=none doubles the number of rows, from 1, until p of the concept is below `goal` after prompts that v was not
made from (every second one; where there is one alone, after that), at most to max_edits. Without prompts v comes from
sentences that repeat the name, and 1 row is changed. Prompts are the `prompts` of a pair, up to the place of the name,
or `prompt`.
Concepts of several tokens are found by their first one; other words that begin with it suffer as well, and are listed.
A row that was turned once is not turned again: that would bring the first concept back (edited=again, or skip).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    from llmsurgery.arch.neurons import NeuronVectors
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.concepts import Concept
    from llmsurgery.data.pairs import Pair
    from llmsurgery.data.records import Row


@dataclass(frozen=True)
class TarsConfig:
    """Hyperparameters of TARS; `llmsurgery methods tars` prints them with their help."""

    mode: str = option("reverse", "what becomes of a row", ("reverse", "zero", "project"))
    n_edits: int | None = option(None, "rows to change; none: 1, 2, 4, ... until `goal` is reached", minimum=1)
    max_edits: int = option(64, "n_edits=none: most rows", minimum=1)
    goal: float = option(0.01, "n_edits=none: probability of the concept to get below", minimum=0, maximum=1)
    theta: float = option(0.15, "cosine below which a row is changed with a notice", minimum=-1, maximum=1)
    layers: tuple[int, ...] = option((), "layers whose rows are scored; empty: all")
    sides: tuple[str, ...] = option(("up", "gate"), "rows that are scored: up, gate")
    prompt: str = option("", "text that the concept follows, where the pair has no `prompts`")
    refine: str = option("head", "how v is made surer of the concept", ("head", "noise", "none"))
    centre: bool = option(True, "take off v what final states share: their mean over ordinary text")
    p_stop: float = option(0.99, "probability at which refining stops", minimum=0, maximum=1)
    sigma: float = option(0.1, "refine=noise: size of a step", minimum=0)
    n_iter: int = option(2000, "refine=noise: steps that are tried", minimum=1)
    edited: str = option("refuse", "a row that an earlier run turned: stop, take the next, or turn it again",
                         ("refuse", "skip", "again"))  # fmt: skip


@register
class Tars:
    """TARS as a method of the toolkit."""

    spec = MethodSpec(
        name="tars",
        task="redirect",
        summary="reverse the few MLP rows that point to a concept, found by its own direction, without training",
        paper="Targeted Angular Reversal of Weights (TARS) for Knowledge Removal in Large Language Models, "
        "arXiv 2412.10257",
        needs=("pairs",),
        export="plain",
        trained=False,
        selects=True,
        targetless=True,
    )
    config_type = TarsConfig

    def plan(self, config: TarsConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices whose rows are scored."""
        return list(dict.fromkeys(place.tensor for place in places(config, structure)))

    def prepare(self, config: TarsConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No rows are needed: pairs are checked by `concepts`."""

    def concepts(self, config: TarsConfig, encoder: Encoder, pairs: Sequence[Pair]) -> list[Concept]:
        """Return what is to go, with the prompts that it is measured on.

        Raises:
            InputError: A concept without tokens.
        """
        return make_concepts(config, encoder, pairs)

    def edit(self, config: TarsConfig, operation: Operation, prepared: None) -> MethodResult:
        """Change rows, concept by concept, each on the model as edited so far."""
        from llmsurgery.methods.turned_rows import RowEditor

        editor = RowEditor(config, operation, places(config, operation.structure))
        records = [editor.remove(concept) for concept in make_concepts(config, operation.encoder, operation.pairs)]
        return MethodResult(editor.edits(), {"concepts": records, "rows": editor.rows})


def make_concepts(config: TarsConfig, encoder: Encoder, pairs: Sequence[Pair]) -> list[Concept]:
    """Return the concepts with their prompts; see `llmsurgery.data.concepts`."""
    from llmsurgery.data.concepts import make_concept

    return [make_concept(encoder, pair, (config.prompt,) if config.prompt else ()) for pair in pairs]


def places(config: TarsConfig, structure: Structure) -> list[NeuronVectors]:
    """Return where the scored rows lie.

    Raises:
        UsageError: An unknown side.
        UnsupportedError: Gates alone are asked for, and the model has none.
    """
    from llmsurgery.arch.neurons import SIDES, neuron_vectors
    from llmsurgery.errors import UsageError

    known = {"up": "in", "gate": "gate"}
    if unknown := [side for side in config.sides if side not in known] or ([] if config.sides else ["(none)"]):
        raise UsageError(f"unknown side {unknown[0]!r}", "rows are those of up and gate", "--set sides=up,gate")
    sides = [known[side] for side in config.sides]
    if "in" in sides and not set(SIDES["gate"]) & set(structure.roles):
        sides = ["in"]
    return [place for side in sides for place in neuron_vectors(structure, side, config.layers or None)]
