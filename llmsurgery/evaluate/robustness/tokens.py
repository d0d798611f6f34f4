"""Answer tokens as what is scored: where they stand, and which of them a model's layers predict."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llmsurgery.compute.head import chunk_rows
from llmsurgery.compute.residual import Lens, read_entries, read_sites
from llmsurgery.data.chat import Encoded
from llmsurgery.data.collate import collate, length_buckets
from llmsurgery.errors import UsageError
from llmsurgery.evaluate.robustness.base import Point, Trial
from llmsurgery.evaluate.robustness.bench import Bench


@dataclass(frozen=True)
class Token:
    """One answer token: row number, position in the row, id."""

    row: int
    position: int
    label: int

    @property
    def key(self) -> str:
        """Its name in a trial."""
        return f"{self.row}:{self.position}"


def answer_tokens(rows: Sequence[Encoded], first_alone: bool = False) -> list[Token]:
    """Return the answer tokens of some rows, end tokens left out.

    Args:
        rows: Encoded rows.
        first_alone: Only the first token of each answer.
    """
    found = []
    for number, row in enumerate(rows):
        start = max(1, row.answer_start)
        stop = len(row.ids) - (1 if row.ends else 0)
        stop = min(stop, start + 1) if first_alone else stop
        found += [Token(number, position, row.ids[position]) for position in range(start, stop)]
    return found


def require_same_ids(attack: str, rows: Sequence[Encoded], ids: object) -> None:
    """Refuse a model whose tokenizer differs from the source's: tokens could not be compared.

    Args:
        attack: Name of the attack.
        rows: Encoded rows.
        ids: Ids of the same rows under the source's tokenizer; None for the source itself.

    Raises:
        UsageError: Some row has other ids.
    """
    if ids is not None and ids != [row.ids for row in rows]:
        raise UsageError(
            "this model and the source have different tokenizers",
            f"{attack} compares them token by token",
            f"drop --attack {attack} for this model, or choose another --retain-model",
        )


def batched_states(
    bench: Bench, rows: Sequence[Encoded], tokens: Sequence[Token], site: str
) -> Iterator[tuple[list[Token], list[torch.Tensor]]]:
    """Yield, batch by batch, answer tokens with the states that predict them at every entry of a site.

    Args:
        bench: The model.
        rows: Encoded rows.
        tokens: Their tokens.
        site: One of `SITES`.

    Yields:
        Tokens, and one tensor [tokens, width] per entry (block) or per block (other sites); nothing where the family
        has no such site.
    """
    by_row: dict[int, list[Token]] = {}
    for token in tokens:
        by_row.setdefault(token.row, []).append(token)
    with bench.progress.task(f"reading {site}", len(rows)) as tick:
        for indices in length_buckets(rows, bench.evaluation.batch_size):
            batch = collate([rows[i] for i in indices], bench.encoder.pad_id, bench.model.device)
            sides = (bench.model, bench.structure)
            with torch.no_grad():
                if site == "block":
                    states: list[torch.Tensor] | None = read_entries(*sides, batch.input_ids, batch.attention_mask)
                else:
                    states = read_sites(*sides, site, batch.input_ids, batch.attention_mask)
            tick(len(indices))
            if states is None:
                return
            chosen = [(place, token) for place, i in enumerate(indices) for token in by_row.get(i, [])]
            if not chosen:
                continue
            places = torch.tensor([place for place, _ in chosen], device=bench.model.device)
            # Position t - 1 predicts token t.
            columns = torch.tensor([token.position - 1 for _, token in chosen], device=bench.model.device)
            yield [token for _, token in chosen], [state[places, columns] for state in states]


def gather_states(bench: Bench, rows: Sequence[Encoded], tokens: Sequence[Token], site: str) -> list[torch.Tensor]:
    """Return the states that predict some tokens, whole; empty where the family has no such site.

    Args:
        bench: The model.
        rows: Encoded rows.
        tokens: Tokens of these rows.
        site: One of `SITES`.

    Returns:
        One tensor [tokens, width] per entry (block) or per block (other sites), in the compute dtype.
    """
    place = {token: number for number, token in enumerate(tokens)}
    found: list[torch.Tensor] = []
    for members, states in batched_states(bench, rows, tokens, site):
        found = found or [state.new_empty(len(tokens), state.shape[-1]) for state in states]
        where = torch.tensor([place[token] for token in members], device=states[0].device)
        for whole, state in zip(found, states, strict=True):
            whole[where] = state
    return found


@dataclass
class LayerReading:
    """What one entry says of every token.

    Attributes:
        hits: Token -> whether the label is the first choice, 0 or 1.
        top10: Token -> whether the label is among the ten first choices.
        probability: Token -> probability of the label.
    """

    hits: dict[str, float]
    top10: dict[str, float]
    probability: dict[str, float]


def read_layers(bench: Bench, rows: Sequence[Encoded], tokens: Sequence[Token], site: str) -> list[LayerReading]:
    """Return what norm and head make of a site at every entry; empty where the family has no such site."""
    lens = Lens(bench.model, bench.structure)
    found: list[LayerReading] = []
    for members, states in batched_states(bench, rows, tokens, site):
        found = found or [LayerReading({}, {}, {}) for _ in states]
        labels = torch.tensor([token.label for token in members], device=bench.model.device)
        keys = [token.key for token in members]
        for reading, state in zip(found, states, strict=True):
            _read_entry(reading, lens, state, labels, keys)
    return found


@torch.no_grad()
def _read_entry(
    reading: LayerReading, lens: Lens, states: torch.Tensor, labels: torch.Tensor, keys: Sequence[str]
) -> None:
    rows = chunk_rows(lens.head.weight)
    for start in range(0, len(keys), rows):
        part = slice(start, start + rows)
        logits = lens.logits(states[part])
        own = logits.gather(1, labels[part, None])
        rank = (logits > own).sum(1)
        probability = (own.squeeze(1) - logits.logsumexp(1)).exp()
        values = zip(keys[part], rank.tolist(), probability.tolist(), strict=True)
        for key, place, share in values:
            reading.hits[key] = float(place == 0)
            reading.top10[key] = float(place < 10)
            reading.probability[key] = share


def choose_layer(label: str, layers: Sequence[Point], rows: int, source: Trial | None, seed: int) -> Point:
    """Return the score at the best layer, the layer for one half of the rows chosen on the other half.

    The best of many layers on the very rows that are reported would look better than any of them is.

    Args:
        label: Label of the new point.
        layers: One point per layer.
        rows: Number of rows.
        source: The trial of the source; what it does not know has no say in the choice.
        seed: Seed of the halves.
    """
    if not any(point.scores for point in layers):
        return Point(label, {})
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    halves = [set(order[half::2]) for half in range(2)]
    scores: dict[str, float] = {}
    chosen = []
    for half in range(2):
        best = max(layers, key=lambda point: _mean_of(point, halves[1 - half], source))
        chosen.append(best.label)
        scores |= {key: value for key, value in best.scores.items() if int(key.partition(":")[0]) in halves[half]}
    ordered = {key: scores[key] for key in layers[0].scores}
    return Point(label, ordered, detail={"layers": chosen})


def _mean_of(point: Point, rows: set[int], source: Trial | None) -> float:
    values = [
        value
        for key, value in point.scores.items()
        if int(key.partition(":")[0]) in rows and (source is None or source.before.get(key, 0.0) >= 0.5)
    ]
    return sum(values) / len(values) if values else 0.0
