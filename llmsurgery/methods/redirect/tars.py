"""TARS: turn the MLP rows that point to a concept the other way, so that it is no longer brought up.

Paper: "Targeted Angular Reversal of Weights (TARS) for Knowledge Removal in Large Language Models", arXiv 2412.10257.
Only its abstract was at hand: what it leaves open is an option here, and no setting is claimed to be the paper's. No
training, no data but the concept's name, and better, prompts whose next word it is.

    v       final hidden state (after the norm) at the end of prompts that the concept follows, mean over them
    refine  v until p = softmax(W_head v)[t] reaches p_stop, t the first token of the concept after the prompt:
            head    v + a (W_head[t] - mean row), the smallest a that reaches it
            noise   v + sigma |v| / sqrt(d) eps, eps ~ N(0, I), kept where p rises
    rows    of up and gate in all layers, by cos(w, v); the largest n_edits are changed:
            reverse  w := -|w| v / |v|     the neuron then writes the opposite of what it wrote
            zero     w := 0                it writes nothing, or in a gate act(0) times what up says
            project  w := w - (w.v) v / |v|^2

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
from statistics import fmean
from typing import TYPE_CHECKING, Any

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.neurons import NeuronVectors
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.concepts import Concept
    from llmsurgery.data.pairs import Pair
    from llmsurgery.data.records import Row

SHOWN = 8
"""Rows and words that a notice lists at most."""


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
    p_stop: float = option(0.99, "probability at which refining stops", minimum=0, maximum=1)
    sigma: float = option(0.1, "refine=noise: size of a step", minimum=0)
    n_iter: int = option(2000, "refine=noise: steps that are tried", minimum=1)
    edited: str = option("refuse", "a row that an earlier run turned: stop, take the next, or turn it again",
                         ("refuse", "skip", "again"))  # fmt: skip


@dataclass(frozen=True)
class RowOf:
    """One scored row.

    Attributes:
        place: The matrix and its side.
        neuron: Number of the neuron.
        cosine: cos(w, v).
    """

    place: NeuronVectors
    neuron: int
    cosine: float

    @property
    def key(self) -> tuple[str, int]:
        """Stored name and index of the row (or column) in the stored matrix."""
        return self.place.tensor.stored, self.place.first + self.neuron


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
        editor = _Editor(config, operation)
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


class _Editor:
    """Changes rows of a model in memory and keeps them as edits.

    Args:
        config: The method's config.
        operation: What the method is given.
    """

    def __init__(self, config: TarsConfig, operation: Operation) -> None:
        self.config, self.operation = config, operation
        self.places = places(config, operation.structure)
        self.rows: list[dict[str, object]] = []
        self._new: dict[str, dict[int, torch.Tensor]] = {}
        self._turned = turned_rows(operation.history)

    def remove(self, concept: Concept) -> dict[str, object]:
        """Find the direction of a concept and change rows until it is gone; return the record."""
        config, operation = self.config, self.operation
        self._warn(concept)
        v, record = self._direction(concept)
        limit = config.n_edits or (config.max_edits if concept.tests else 1)
        ranked = self._ranked(v, limit)
        tests: list[dict[str, float]] = []
        done, wanted = 0, config.n_edits or 1
        while True:
            for row in ranked[done:wanted]:
                self._change(row, v, concept)
            done = min(wanted, len(ranked))
            chance = self._chance(concept.tests) if concept.tests else None
            if chance is not None:
                tests.append({"rows": done, "p": chance})
            if config.n_edits or chance is None or chance < config.goal or done >= len(ranked):
                break
            wanted = min(2 * wanted, limit)
        if config.n_edits is None and tests and tests[-1]["p"] >= config.goal:
            operation.progress.notice(
                f"{concept.name!r}: p is {tests[-1]['p']:.3f} after {done} rows, the goal was {config.goal:g}"
            )
        if weak := sum(row.cosine < config.theta for row in ranked[:done]):
            operation.progress.notice(
                f"{concept.name!r}: {weak} of {done} changed rows have a cosine below theta={config.theta:g} and have "
                "little to do with it"
            )
        switched = self._switched_off(ranked[:done])
        return {"name": concept.name, **record, "edits": done, "tests": tests, "switched_off": switched}

    def _warn(self, concept: Concept) -> None:
        from llmsurgery.data.concepts import words_with

        notice = self.operation.progress.notice
        if not concept.given:
            notice(
                f"{concept.name!r} has no prompts: its direction comes from sentences that repeat it, and 1 row is "
                "changed; prompts that it follows find it better"
            )
        if concept.tokens > 1:
            words = words_with(self.operation.encoder, concept)[:SHOWN]
            others = f", such as {', '.join(map(repr, words))}" if words else ""
            notice(
                f"{concept.name!r} has {concept.tokens} tokens and is found by the first, {concept.text!r}: other "
                f"words that begin with it lose as well{others}"
            )

    def _direction(self, concept: Concept) -> tuple[torch.Tensor, dict[str, object]]:
        """Return v [width], fp32, and how it came about."""
        import torch

        from llmsurgery.compute.angles import refine_by_head, refine_by_noise
        from llmsurgery.compute.head import read_head
        from llmsurgery.evaluate.concept import end_state

        model, config = self.operation.model, self.config
        start = torch.cat([end_state(model, ids).float() for ids in concept.makers]).mean(0)
        head = read_head(model).weight.float()
        before = float((head @ start).softmax(0)[concept.token])
        v, steps = start, 0.0
        if config.refine == "head":
            v, steps = refine_by_head(start, head, concept.token, config.p_stop)
        elif config.refine == "noise":
            v, steps = refine_by_noise(
                start, head, concept.token, config.p_stop, config.sigma, config.n_iter, self.operation.seed
            )
        after = float((head @ v).softmax(0)[concept.token])
        cosine = float(torch.nn.functional.cosine_similarity(v, start, dim=0))
        record: dict[str, object] = {
            "token": {"id": concept.token, "text": concept.text},
            "prompts": {"direction": len(concept.makers), "test": len(concept.tests), "given": concept.given},
            "p": {"start": before, "refined": after},
            "refined": {"by": config.refine, "amount": steps, "cos": cosine},
        }
        return v.cpu(), record

    def _chance(self, prompts: Sequence[tuple[tuple[int, ...], int]]) -> float:
        """Return the mean probability of the concept's first token after prompts."""
        from llmsurgery.evaluate.concept import concept_probability

        return fmean(concept_probability(self.operation.model, ids, token) for ids, token in prompts)

    def _ranked(self, v: torch.Tensor, limit: int) -> list[RowOf]:
        """Return the rows with the largest cosines, best first, as many as may be changed."""
        from llmsurgery.compute.angles import cosines

        found: list[RowOf] = []
        with self.operation.progress.task("rows", len(self.places)) as tick:
            for place in self.places:
                scores = cosines(self._vectors(place), v)
                # Rows that are skipped make room for others.
                top = scores.topk(min(limit + len(self._turned), len(scores)))
                found += [
                    RowOf(place, neuron, cosine)
                    for neuron, cosine in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ]
                tick(1)
        found.sort(key=lambda row: (-row.cosine, row.key))
        if self.config.edited == "skip":
            return [row for row in found if row.key not in self._turned][:limit]
        return found[:limit]

    def _vectors(self, place: NeuronVectors) -> torch.Tensor:
        """Return the vectors of a place [count, width], as stored and as edited so far."""
        import torch

        matrix = torch.from_numpy(self.operation.read(place.tensor.stored))
        matrix = matrix if place.as_rows else matrix.T
        vectors = matrix[place.first : place.first + place.count]
        if new := self._new.get(place.tensor.stored):
            vectors = vectors.clone()
            for index, row in new.items():
                if place.first <= index < place.first + place.count:
                    vectors[index - place.first] = row.to(vectors)
        return vectors

    def _change(self, row: RowOf, v: torch.Tensor, concept: Concept) -> None:
        """Change one row in the model and among the edits.

        Raises:
            UsageError: It was changed before.
        """
        from llmsurgery.compute.angles import changed_row
        from llmsurgery.compute.view import weight_view
        from llmsurgery.errors import UsageError

        name, index = row.key
        if row.key in self._turned and self.config.edited == "refuse":
            raise UsageError(
                f"row {index} of {name} was turned before, for {self._turned[row.key]!r}",
                f"it is the best row for {concept.name!r} too, and turning it again would bring the first back",
                "--set edited=skip takes the next row, --set edited=again turns it all the same",
            )
        old = self._vectors(row.place)[row.neuron]
        new = changed_row(old, v, self.config.mode)
        self._new.setdefault(name, {})[index] = new
        self._turned[row.key] = concept.name
        view = weight_view(self.operation.model, row.place.tensor)
        (view if row.place.as_rows else view.T)[index].copy_(new)
        tensor = row.place.tensor
        record: dict[str, object] = {
            "concept": concept.name,
            "tensor": name,
            "row": index,
            "side": "up" if row.place.side == "in" else "gate",
            "layer": tensor.layer,
            "neuron": row.neuron,
            "expert": tensor.expert,
            "part": row.place.part,
            "cos": row.cosine,
            "tokens": self._named(old),
        }
        self.rows.append(record)
        if len(self.rows) <= SHOWN:
            names = ", ".join(map(repr, self._named(old)))
            self.operation.progress.notice(
                f"{self.config.mode} {record['side']} row {tensor.layer}:{row.neuron}, cos {row.cosine:.3f}: {names}"
            )

    def _named(self, vector: torch.Tensor) -> list[str]:
        """Return the first tokens that a vector names through the head."""
        from llmsurgery.compute.head import read_head

        head = read_head(self.operation.model).weight
        ids = (head @ vector.to(head)).topk(3).indices.tolist()
        return [str(self.operation.encoder.tokenizer.decode([number])) for number in ids]

    def _switched_off(self, rows: Sequence[RowOf]) -> list[dict[str, Any]]:
        """Return the neurons whose gate and up were both changed."""
        sides: dict[tuple[Any, ...], set[str]] = {}
        for row in rows:
            tensor = row.place.tensor
            sides.setdefault((tensor.layer, row.place.part, tensor.expert, row.neuron), set()).add(row.place.side)
        names = ("layer", "part", "expert", "neuron")
        return [dict(zip(names, key, strict=True)) for key, found in sides.items() if len(found) > 1]

    def edits(self) -> list[Any]:
        """Return the changed rows as exact edits, one per matrix."""
        import numpy as np

        from llmsurgery.edits.kinds import Sparse

        tensors = {place.tensor.stored: place.tensor for place in self.places}
        result = []
        for name, rows in self._new.items():
            shape = tensors[name].shape
            flat = np.arange(shape[0] * shape[1], dtype=np.int64).reshape(shape)
            numbers = flat.T if tensors[name].transposed else flat
            order = sorted(rows)
            indices = np.concatenate([numbers[index] for index in order])
            values = np.concatenate([rows[index].cpu().numpy() for index in order])
            ascending = np.argsort(indices)
            result.append(Sparse(name, indices[ascending], values[ascending]))
        return result


def turned_rows(history: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], str]:
    """Return the rows that earlier runs changed, from the operations that made the source: (tensor, row) -> concept."""
    found = {}
    for operation in history:
        if operation.get("method") == "tars":
            for row in operation.get("record", {}).get("rows", []):
                found[row["tensor"], row["row"]] = row["concept"]
    return found
