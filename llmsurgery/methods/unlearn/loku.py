"""LoKU: the inverted hinge loss, and adapters that start from what matters to the forget rows.

Paper: "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs", arXiv 2408.06621 (ICLR 2025).

**Inverted hinge loss** (IHL). For a labelled token y of a forget row, with p = softmax(z):

    L_t   = max(0, margin + p(y) - max over v != y of p(v))          in [0, 2] for margin 1
    total = mean L_t of forget rows + retain_weight * cross-entropy of retain rows, one drawn at random per forget row

Its gradient pushes the true token down and the best other one up, and reaches the rest of the vocabulary only through
their difference; it stops by itself. A loss near 0 means that another token wins, not that p(y) is 0: read
`forget.extraction_strength` too.

**FILA** (`init=fila`, adapters only). For every targeted matrix W [outputs, inputs], before training:

    I_f, I_r  mean squared gradient of the cross-entropy on forget and on retain rows, elementwise
    I_rel     = I_f / (eps + I_r),     d_i = sqrt(sum_j I_rel[i, j])
    U S Q^T   = leading singular triples of diag(d) W,     s = alpha / rank,     S' = S / s
    A         = sqrt(S') Q^T,          B = diag(1 / (d + eps)) U sqrt(S')

so that s B A is the slice of W of that rank with the least row-weighted error. It is what trains; the rest is frozen.

What differs from the released code (csm9493/efficient-llm-unlearning at 272484a):

- Its save step unloads the trained adapter and writes the residual base W - s B0 A0 without it, and its evaluation
  merges the trained adapter onto the original base. Neither is the unlearned model. Here W stays as it is stored, a
  second, frozen adapter -s B0 A0 stands beside the trained one, and the edit of every matrix is s (B A - B0 A0), of
  twice the rank, relative to the stored W. Adapter off is the source, in every dtype; `--save adapter` holds both.
- It casts A, B and the residual to bf16 one by one, which moves the model before training. Here factors are fp32 and no
  residual is written; the largest change of a logit at step 0 is measured, recorded, and refused above 1e-3 (5e-2 in
  16 bits).
- Its two constants 1e-5 are absolute, and squared gradients below that, normal in large models, reduce I_rel to a
  multiple of I_f. Here eps is 1e-5 of the mean of I_r, and d is divided by its mean before 1e-5 is added;
  `strict=true` is theirs.
- Its importance squares gradients of batches of 2 to 4 rows, which is not Fisher information; `importance_batch` does
  that, and 1, the default, squares the gradient of each row.
- It uses a randomised decomposition without oversampling, here exact up to a side of 2048, then with 32 further
  directions and four iterations.
- A library's hinge loss takes its inputs for logits or probabilities by their range; the four lines here do not.
- Its mean runs over the tokens of a micro-batch, so that long answers dominate and results depend on the micro-batch;
  `reduction=token` is that, the default averages per row first.
- Decoupled weight decay pulls A and B to 0, which for FILA is the residual model and not the source; the default is
  none.
- Its preference branch is broken and left out, as is its NPO loss.

Routed experts take no adapters and no FILA. Importance sees at most `importance_rows` rows of each set by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.registry import register
from llmsurgery.train.config import TrainingConfig, option, trained_tensors

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.train.trainable import Factors


@dataclass(frozen=True)
class LokuConfig:
    """Hyperparameters of LoKU; `llmsurgery methods loku` prints them with their help."""

    loss: str = option("ihl", "forget loss: inverted hinge, or gradient ascent for comparison", ("ihl", "ascent"))
    margin: float = option(1.0, "margin of the hinge; from 1 up it never acts", minimum=0, maximum=2)
    retain_weight: float = option(1.0, "weight of the retain rows' cross-entropy", minimum=0)
    reduction: str = option("row", "mean per row first, or over the tokens as released", ("row", "token"))
    init: str = option("fila", "start of the adapters; without effect under train=full", ("fila", "lora"))
    importance_rows: int = option(256, "rows of each set that importance sees; 0: all", minimum=0)
    importance_batch: int = option(1, "rows whose gradients are added before they are squared", minimum=1)
    importance_memory: float = option(
        4.0, "GiB of importance maps at once; beyond it the rows are passed again", minimum=0
    )
    strict: bool = option(False, "the released code's absolute constants 1e-5 in FILA")
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(weight_decay=0.0))


@dataclass(frozen=True)
class LokuData:
    """Encoded rows; every token of a plain text is labelled."""

    forget: list[Encoded]
    retain: list[Encoded]


@register
class Loku:
    """LoKU as a method of the toolkit."""

    spec = MethodSpec(
        name="loku",
        task="unlearn",
        summary="inverted hinge loss, and adapters that start from what matters to the forget rows",
        paper="Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs, arXiv 2408.06621",
        needs=("forget", "retain"),
        export="plain",
        trained=True,
        until="forget.token_prob<=0.2x",
        # Its factors start large, and so do the changes that a step of some size makes.
        lr_scale=0.5,
        presets={
            "paper": {
                "rank": 16,
                "alpha": 32.0,
                "lr": 1e-4,
                "epochs": 5,
                "max_steps": 0,
                "batch_size": 32,
                "schedule": "linear",
                "warmup_steps": -1,
                "weight_decay": 0.01,
                "max_length": 500,
                "reduction": "token",
                "importance_rows": 0,
                "importance_batch": 2,
                "strict": True,
            }
        },
    )
    config_type = LokuConfig

    def plan(self, config: LokuConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the tensors that training may move."""
        return trained_tensors(config.training, structure)

    def prepare(self, config: LokuConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> LokuData:
        """Encode forget and retain rows."""
        limit = config.training.max_length
        return LokuData(*(_encode(encoder, name, data[name], limit) for name in ("forget", "retain")))

    def edit(self, config: LokuConfig, operation: Operation, prepared: LokuData) -> MethodResult:
        """Find where the adapters start, train, and return what moved as edits."""
        from llmsurgery.compute.head import label_log_probabilities, labelled_hidden, read_head
        from llmsurgery.compute.hinge import inverted_hinge
        from llmsurgery.data.collate import collate
        from llmsurgery.train.fila import check_start
        from llmsurgery.train.loop import train
        from llmsurgery.train.pooling import row_means
        from llmsurgery.train.trainable import prepare_trainable

        session, model = operation.training, operation.model
        targets = self.plan(config, operation.structure)
        record: dict[str, object] = {}
        start = _start(config, operation, prepared, targets, record)
        with prepare_trainable(model, targets, config.training, operation.read, start) as trainable:
            if start is not None:
                few = prepared.forget[:1] + prepared.retain[:1]
                record["logit_change_at_start"] = check_start(trainable, few, operation.encoder.pad_id)

            def loss(indices: Sequence[int]) -> torch.Tensor:
                count = len(indices)
                rows = [prepared.forget[i] for i in indices]
                rows += [prepared.retain[session.random.randrange(len(prepared.retain))] for _ in indices]
                batch = collate(rows, operation.encoder.pad_id, model.device)
                hidden, owners, labels = labelled_hidden(
                    model, batch.input_ids, batch.attention_mask, batch.label_mask, trainable.autocast
                )
                head, first = read_head(model), owners < count

                def mean(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
                    return values.mean() if config.reduction == "token" else row_means(values, rows, count).mean()

                if config.loss == "ihl":
                    values = inverted_hinge(hidden[first], head, labels[first], config.margin)
                else:
                    values = label_log_probabilities(hidden[first], head, labels[first])
                scores = label_log_probabilities(hidden[~first], head, labels[~first])
                forget, retain = mean(values, owners[first]), mean(-scores, owners[~first] - count)
                session.observe(forget_loss=float(forget.detach()), retain_loss=float(retain.detach()))
                return forget + config.retain_weight * retain

            result = train(trainable, loss, len(prepared.forget), config.training, session)
            return MethodResult(trainable.edits(), {**result.record(), **record})


def _encode(encoder: Encoder, name: str, rows: Sequence[Row], limit: int) -> list[Encoded]:
    from llmsurgery.data.chat import CHUNK_TOKENS
    from llmsurgery.errors import InputError

    encoded: list[Encoded] = []
    for row in rows:
        if row.kind == "text":
            parts = encoder.encode_chunks(row, min(limit, CHUNK_TOKENS))
            encoded += [replace(part, answer_start=0) for part in parts]
        else:
            encoded.append(encoder.encode(row, None, limit))
    if not encoded:
        raise InputError(f"no {name} row can be trained on", "every passage has fewer than four tokens", "")
    return encoded


def _start(
    config: LokuConfig,
    operation: Operation,
    prepared: LokuData,
    targets: Sequence[RoleTensor],
    record: dict[str, object],
) -> dict[str, Factors] | None:
    """Return the factors that adapters start from, None where they start as usual; tell the record of it."""
    from llmsurgery.train.fila import Importance, fila_start, sample_rows

    if config.training.train != "lora" or config.init != "fila":
        return None
    forget, retain = (
        sample_rows(rows, config.importance_rows, operation.seed) for rows in (prepared.forget, prepared.retain)
    )
    importance = Importance(
        operation.model,
        forget,
        retain,
        operation.encoder.pad_id,
        config.importance_batch,
        operation.training.micro_batch,
        config.importance_memory,
        config.strict,
        operation.statistics,
        operation.progress,
    )
    record["importance"] = {
        "rows": {"forget": len(forget), "retain": len(retain)},
        "eps": "absolute" if config.strict else "relative",
    }
    return fila_start(importance, targets, config.training, operation.read, operation.seed)
