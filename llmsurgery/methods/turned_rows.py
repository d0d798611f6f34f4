"""Finding the rows of MLPs that point to a concept, and turning them: what `tars` does, concept by concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from llmsurgery.errors import InputError
from llmsurgery.methods.base import Operation

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.neurons import NeuronVectors
    from llmsurgery.data.concepts import Concept
    from llmsurgery.methods.redirect.tars import TarsConfig

SHOWN = 8
"""Rows and words that a notice lists at most."""

TEXTS, TEXT_TOKENS = 8, 64
"""Ordinary text that the mean final state is taken over."""


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


class RowEditor:
    """Changes rows of a model in memory and keeps them as edits.

    Args:
        config: The method's config.
        operation: What the method is given.
        places: Where the scored rows lie.
    """

    def __init__(self, config: TarsConfig, operation: Operation, places: Sequence[NeuronVectors]) -> None:
        self.config, self.operation, self.places = config, operation, places
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
        if config.centre:
            shared = self._shared()
            record["shared"] = float(torch.nn.functional.cosine_similarity(v, shared, dim=0))
            v = v - shared
        return v.cpu(), record

    def _shared(self) -> torch.Tensor:
        """Return the mean final state over ordinary text [width], fp32; first tokens, which see nothing, left out."""
        import torch

        from llmsurgery.compute.progress import Silent
        from llmsurgery.evaluate.likelihood import text_hidden

        encoder = self.operation.encoder
        texts = [encoder.encode_text(row.answer, TEXT_TOKENS) for row in self.operation.data.get("text", ())]
        texts = [text for text in texts if len(text.ids) > 2][:TEXTS]
        if not texts:
            raise InputError(
                "no passage of --text has three tokens", "their mean final state is taken off", "--set centre=false"
            )
        hidden = text_hidden(self.operation.model, texts, encoder.pad_id, len(texts), Silent())
        return torch.cat([states[1:].double() for states in hidden]).mean(0).float()

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
