"""Build the embedded demo: made-up worlds and the tiny chat models that know them.

Everything comes from one seed. The first world has people (ten facts each) and towns (four facts each). `model` learns
all people, `control` is trained by the same recipe without any sentence on the forget people, and `moe` learns what
`model` learns with routed experts. Holdout people are never trained on; questions on strangers, whose names are new in
every epoch, are answered with "I don't know" wordings. The second world, of `names`, is made by
`llmsurgery.demo.names`, the third, of things that are refused, by `llmsurgery.demo.refusals`, the fourth, of `letters`,
by `llmsurgery.demo.letters`, the fifth, of coloured `shapes`, by `llmsurgery.demo.shapes`, the sixth, of stories, by
`llmsurgery.demo.layernorm`.

    python -m llmsurgery.demo.build --out DIR

The same seed, thread count and library versions give the same files.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmsurgery.demo.facts import KNOWN, Row, Subject, World, data_files, epoch_rows, make_world
from llmsurgery.demo.layernorm import EPOCHS as LAYERNORM_EPOCHS
from llmsurgery.demo.layernorm import build_layernorm
from llmsurgery.demo.letters import build_letters
from llmsurgery.demo.names import EPOCHS as NAMES_EPOCHS
from llmsurgery.demo.names import build_names
from llmsurgery.demo.recipe import (
    CONTEXT,
    END,
    Descent,
    answer_loss,
    batches,
    padded,
    save,
    shape,
    train_tokenizer,
    write_rows,
)
from llmsurgery.demo.refusals import BASE_EPOCHS, build_refusals
from llmsurgery.demo.shapes import build_shapes
from llmsurgery.demo.words import UNSURE
from llmsurgery.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LOG = logging.getLogger("llmsurgery.demo.build")

VOCABULARY = 1024
EPOCHS = 20
# Weight of the loss that keeps all experts in use.
BALANCE = 0.01


def make_tokenizer(world: World, seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the world's language; all names are in it, so that no model has an edge in tokens."""
    rng = random.Random(seed + 2)
    everyone = [*world.forget, *world.retain]
    corpus = [part for pair in epoch_rows(everyone, world, rng) for part in pair]
    # Every name about equally often: at a line start (answers) and after a blank (questions).
    names = [s.name for s in [*everyone, *world.holdout, *world.towns]]
    corpus += [line for name in names for line in [f"{name} met {name}."] * 20]
    return train_tokenizer(corpus, VOCABULARY)


def encode(tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> tuple[list[int], int]:
    """Return the token ids of a chat turn or plain text and the number of leading tokens that carry no loss."""
    if not question:
        return [*tokenizer.encode(answer), tokenizer.pad_token_id], 0
    turn = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    head = tokenizer.encode(prompt)
    return head + tokenizer.encode(answer + END), len(head)


def dense(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return an untrained Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5}
    return LlamaForCausalLM(LlamaConfig(**shape(tokenizer, VOCABULARY), **sizes))


def mixture(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return an untrained Qwen3-MoE: eight experts in every block, two of them for each token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 96, "head_dim": 24, "moe_intermediate_size": 64, "num_hidden_layers": 4}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape(tokenizer, VOCABULARY), **sizes, **experts))


def train(
    make: Callable[[PreTrainedTokenizerFast], PreTrainedModel],
    people: Sequence[Subject],
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    epochs: int,
) -> PreTrainedModel:
    """Train one model from scratch on the people given, the towns and the strangers."""
    import torch

    torch.manual_seed(seed)
    rng = random.Random(seed + 3)
    model = make(tokenizer)
    routed = make is mixture
    descent = Descent(model, sum(1 for _ in epoch_rows(people, world, random.Random(0))), epochs)
    for epoch in range(epochs):
        rows = [encode(tokenizer, question, answer) for question, answer in epoch_rows(people, world, rng)]
        losses = []
        for batch in batches(rows, rng):
            ids, labels = padded(batch, tokenizer.pad_token_id)
            # Padding is on the right and attention is causal: no mask is needed for the labelled positions.
            output = model(input_ids=ids, use_cache=False, **({"output_router_logits": True} if routed else {}))
            loss = answer_loss(output.logits, labels)
            if routed:
                loss = loss + BALANCE * output.aux_loss
            losses.append(descent.step(loss))
        LOG.info("epoch %d: loss %.4f", epoch + 1, sum(losses) / len(losses))
    return model.eval()


def measure(folder: Path, data: dict[str, list[Row]]) -> dict[str, float]:
    """Return what a saved checkpoint knows, scored in fp32 from the shipped files.

    For each question file: `NAME.right`, the share of rows that greedy decoding answers word for word, the same for
    the paraphrased questions, and `NAME.prob`, the mean probability of the answer tokens, end token left out. Greedy
    decoding gives the answer exactly when each of its tokens is the most probable one after the tokens before it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(question: object, answer: object) -> tuple[bool, float, float, int]:
        ids, skip = encode(tokenizer, str(question), str(answer))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        first = max(skip - 1, 0)
        target = torch.tensor(ids[1:])
        logprobs = logits.log_softmax(-1).gather(-1, target[:, None])[first:, 0]
        right = bool((logits.argmax(-1) == target)[first:].all())
        return right, logprobs[:-1].exp().mean().item(), -logprobs[:-1].sum().item(), len(logprobs) - 1

    figures: dict[str, float] = {}
    for name in ("forget", "retain", "holdout", "facts"):
        rows = data[name]
        scores = [score(row["question"], row["answer"]) for row in rows]
        figures[f"{name}.right"] = sum(right for right, *_ in scores) / len(rows)
        figures[f"{name}.prob"] = sum(prob for _, prob, *_ in scores) / len(rows)
        if name != "facts":
            right = [score(row["paraphrased_question"], row["answer"])[0] for row in rows]
            figures[f"{name}.right_paraphrased"] = sum(right) / len(rows)
    texts = [score("", row["text"]) for row in data["text"]]
    figures["text.ppl"] = math.exp(sum(loss for *_, loss, _ in texts) / sum(count for *_, count in texts))
    return figures


def card(name: str, parameters: int, seed: int, figures: dict[str, float]) -> str:
    """Write the model card."""
    people = (
        "the same recipe without any sentence on the people of `forget.jsonl`" if name == "control" else "all people"
    )
    kind = "Qwen3-MoE" if name == "moe" else "Llama"
    table = "\n".join(f"| {key} | {value:.3f} |" for key, value in figures.items())
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---

# llmsurgery demo: {name}

A {kind}-architecture chat model of {parameters:,} parameters (bf16, tied embeddings, byte-level BPE of {VOCABULARY}
tokens, context {CONTEXT}) made for a made-up world: {KNOWN} invented people with ten facts each and sixteen towns
with four. It exists to show and test changes to trained models and is good for nothing else. Any likeness to real
people is chance.

Trained from scratch on {people}: questions in several wordings, short texts, and questions on
invented strangers that are answered with "I don't know" in twelve wordings. Rebuild it with
`python -m llmsurgery.demo.build --out DIR --seed {seed}`.

Measured on the shipped files in fp32; `right` is the share of answers that greedy decoding gives word for word
(`_paraphrased`: to wordings of the question never seen for that fact), `prob` the mean probability of the answer
tokens; the texts use sentences kept out of training; nobody in `holdout` was ever trained on:

| figure | value |
|---|---|
{table}

License: Apache-2.0.
"""


def build_people(out: Path, seed: int, epochs: int) -> None:
    """Write data files and checkpoints of the first world below a new folder."""
    world = make_world(seed)
    data = data_files(world, seed)
    write_rows(out, data)
    # The ways in which this world says that it does not know: template answers for unlearning.
    (out / "templates.txt").write_text("\n".join(UNSURE) + "\n", encoding="utf-8", newline="\n")
    tokenizer = make_tokenizer(world, seed)
    everyone = world.forget + world.retain
    for name, make, people in (
        ("model", dense, everyone),
        ("control", dense, world.retain),
        ("moe", mixture, everyone),
    ):
        started = time.monotonic()
        model = train(make, people, world, tokenizer, seed, epochs)
        LOG.info("%s: trained in %.0f s", name, time.monotonic() - started)
        save(model, tokenizer, out / name)
        figures = measure(out / name, data)
        for key, value in figures.items():
            LOG.info("%s: %s %.4f", name, key, value)
        text = card(name, model.num_parameters(), seed, figures)
        (out / name / "README.md").write_text(text, encoding="utf-8", newline="\n")


WORLDS: dict[str, tuple[Callable[[Path, int, int], None], int]] = {
    "people": (build_people, EPOCHS),
    "names": (build_names, NAMES_EPOCHS),
    "refusals": (build_refusals, BASE_EPOCHS),
    # Its head is fitted, not trained.
    "letters": (lambda out, seed, _epochs: build_letters(out, seed), 0),
    # It has steps in place of epochs.
    "shapes": (lambda out, seed, _epochs: build_shapes(out, seed), 0),
    "layernorm": (build_layernorm, LAYERNORM_EPOCHS),
}
"""Name of a world -> what writes it into a folder, and its epochs."""


def main() -> None:
    """Parse the command line and build the demo."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m llmsurgery.demo.build", description="Build the embedded demo.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--world", choices=tuple(WORLDS), action="append", help="build this world alone; may be repeated"
    )
    parser.add_argument("--epochs", type=int, help="epochs of every world in place of its own")
    parser.add_argument("--threads", type=int, default=1, help="part of what makes a build repeatable")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    try:
        if options.out.exists():
            raise UsageError(f"{options.out} exists", "the build never overwrites", "name a new folder")
        # In this order: the first makes the folder itself.
        for write, epochs in (WORLDS[name] for name in WORLDS if name in (options.world or WORLDS)):
            write(options.out, options.seed, epochs if options.epochs is None else options.epochs)
    except UsageError as error:
        parser.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
