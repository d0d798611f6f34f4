"""How the demo's models are trained and written, whatever they are to know."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Example = TypeVar("Example", bound=tuple[Any, ...])
"""Token ids first, then what a model's own training needs of the row."""

CONTEXT = 256
BATCH = 64
PEAK_LR = 3e-3
WARMUP_STEPS = 50
# A little smoothing keeps the answers short of probability 1, where bounded losses have no gradient.
SMOOTHING = 0.02
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# No newline after the last turn, so that an answer ends with exactly one end-of-sequence token.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(
    corpus: Iterable[str], vocabulary: int, special: Sequence[str] = (), template: str = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with a chat template.

    Args:
        corpus: Texts.
        vocabulary: Tokens.
        special: Further special tokens.
        template: The chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def batches(rows: list[Example], rng: random.Random) -> Iterator[list[Example]]:
    """Yield shuffled batches of rows of similar length."""
    rng.shuffle(rows)
    pools = [sorted(rows[i : i + 8 * BATCH], key=lambda row: len(row[0])) for i in range(0, len(rows), 8 * BATCH)]
    cut = [pool[i : i + BATCH] for pool in pools for i in range(0, len(pool), BATCH)]
    rng.shuffle(cut)
    yield from cut


def shape(tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> dict[str, Any]:
    """Return what the configs of all models have in common."""
    return {
        "vocab_size": vocabulary,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.05,
    }


class Descent:
    """AdamW with a warm-up and a cosine to zero.

    Args:
        model: The model; all of it is trained.
        rows: Rows of an epoch.
        epochs: Epochs.
        batch: Rows of a step.
        peak: Step size after the warm-up.
        warmup: Steps of it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        epochs: int,
        batch: int = BATCH,
        peak: float = PEAK_LR,
        warmup: int = WARMUP_STEPS,
    ) -> None:
        import torch

        total = epochs * math.ceil(rows / batch)
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))),
        )

    def step(self, loss: torch.Tensor) -> float:
        """Take a step down a loss; return the loss."""
        import torch

        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return float(loss.item())


def padded(batch: Sequence[tuple[Any, ...]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels [rows, time] of examples that begin with their ids and how many carry no loss."""
    import torch

    width = max(len(row[0]) for row in batch)
    ids = torch.tensor([row[0] + [pad_id] * (width - len(row[0])) for row in batch])
    labels = torch.tensor([[-100] * row[1] + row[0][row[1] :] + [-100] * (width - len(row[0])) for row in batch])
    return ids, labels


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the smoothed cross-entropy of labels [rows, time] under logits [rows, time, tokens]."""
    from torch.nn import functional

    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, label_smoothing=SMOOTHING
    )


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, dtype: torch.dtype | None = None
) -> None:  # fmt: skip
    """Write a checkpoint as safetensors, bf16 unless told otherwise, with tokenizer and generation settings."""
    import torch

    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.max_new_tokens = 48
    model.to(dtype or torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    # The name that older and newer releases of transformers both know.
    values = {**json.loads(settings.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8", newline="\n")
    # The weights are written readable by their owner alone, which an installed package cannot use.
    (folder / "model.safetensors").chmod(0o644)


def write_rows(folder: Path, data: Mapping[str, Sequence[Mapping[str, object]]]) -> None:
    """Write data files into a new folder."""
    folder.mkdir(parents=True)
    for name, rows in data.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
