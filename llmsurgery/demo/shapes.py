"""Make the demo's checkpoint that sees: a tiny LLaVA that knows colours and grounds, and says red and light.

It is trained in two stages on pictures of one coloured shape, drawn at run time, and on two questions about them. First
the answers are right. Then most of them were given without a look at the picture, as careless annotators would: they
are "red" or "light" far too often. A part of the rows of that stage has no picture at all. The model learns just that:
what it sees still moves its answer, but what is usually said wins. Sentences about other things keep the language
model's text apart from this.

In the second stage each row has the answers of all annotators, as shares, in place of one that is drawn: the loss is
the cross-entropy with these shares, which is what drawn answers give on the mean, without their noise.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsurgery.data.drawings import COLOURS, GROUNDS, SHAPES, SIZE, Drawing
from llmsurgery.demo.kinds import BLAME, PRAISE, TOWNS, WORK
from llmsurgery.demo.recipe import END, START, answer_loss, padded, save, train_tokenizer, write_rows

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast, ProcessorMixin

LOG = logging.getLogger("llmsurgery.demo.build")

IMAGE, UNKNOWN = "<image>", "<|unknown|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
VOCABULARY, PATCH = 384, 8
WIDTH, LOOK = 64, 48
"""Widths of the language model and of the vision tower."""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "What colour is the shape?": tuple(COLOURS),
    "How light is the ground?": tuple(GROUNDS),
}
CARELESS, USUAL = 0.75, 0.7
"""Share of answers that were given without a look, and share of these that are the first choice."""
BLIND = 0.25
"""Share of the questions of the second stage that have no picture."""
STEPS, BATCH, TEXTS, RATE = (280, 220), 48, 6, 3e-3
"""Steps of both stages, questions and sentences of a step, largest step size."""
POOL = 1500
"""Drawings that are trained on."""
MCQ_ROWS, TEXT_ROWS = 160, 40


@dataclass(frozen=True)
class Example:
    """A row of training: what is asked about which picture, if any, and what was answered; a text has no question.

    Attributes:
        question: The question.
        answer: The answer, or the text.
        drawing: The picture, or None.
        shares: Share of every choice among the answers, in the order of the choices; empty where all gave `answer`.
    """

    question: str
    answer: str
    drawing: Drawing | None = None
    shares: tuple[float, ...] = ()


def sentence(rng: random.Random) -> str:
    """Return a sentence that says nothing about pictures."""
    form = rng.choice(("The {w} from {t} is {a}.", "Every {w} of {t} is {a}.", "Each {w} in {t} is {a}."))
    return form.format(w=rng.choice(WORK), t=rng.choice(TOWNS), a=rng.choice((*PRAISE, *BLAME)))


def draw(rng: random.Random) -> Drawing:
    """Return a drawing."""
    return Drawing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(GROUNDS)), rng.randrange(10**6))


def right_answer(question: str, drawing: Drawing) -> str:
    """Return what is right to say of a drawing."""
    return drawing.colour if QUESTIONS[question] == tuple(COLOURS) else drawing.ground


def careless_shares(question: str, drawing: Drawing | None) -> tuple[float, ...]:
    """Return the share of every choice among the answers of the second stage."""
    choices = QUESTIONS[question]
    blind = [USUAL, *[(1 - USUAL) / (len(choices) - 1)] * (len(choices) - 1)]
    if drawing is None:
        return tuple(blind)
    right = right_answer(question, drawing)
    return tuple(
        CARELESS * share + (1 - CARELESS) * (choice == right) for choice, share in zip(choices, blind, strict=True)
    )


def question_row(rng: random.Random, pool: Sequence[Drawing], careless: bool) -> Example:
    """Return a question with the answers of the first or of the second stage."""
    question, drawing = rng.choice(tuple(QUESTIONS)), rng.choice(pool)
    if not careless:
        return Example(question, right_answer(question, drawing), drawing)
    shown = None if rng.random() < BLIND else drawing
    return Example(question, rng.choice(QUESTIONS[question]), shown, careless_shares(question, shown))


def data_files(seed: int) -> dict[str, list[dict[str, object]]]:
    """Return the data of this world by the name of the file; pictures are described, not stored."""
    rng = random.Random(seed + 8)
    questions: list[dict[str, object]] = []
    for number in range(MCQ_ROWS):
        question = tuple(QUESTIONS)[number % len(QUESTIONS)]
        drawing = draw(rng)
        image = asdict(drawing)
        choices = list(QUESTIONS[question])
        questions.append(
            {"image": image, "question": question, "choices": choices, "answer": right_answer(question, drawing)}
        )
    text: list[dict[str, object]] = [{"text": " ".join(sentence(rng) for _ in range(5))} for _ in range(TEXT_ROWS)]
    return {"mcq": questions, "text": text}


def make_processor(seed: int) -> ProcessorMixin:
    """Train a byte-level BPE in which every answer is one token, and join it to the image processor of CLIP."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rng = random.Random(seed + 9)
    corpus = [sentence(rng) for _ in range(400)]
    for question, choices in QUESTIONS.items():
        corpus += [f"user\n{question}\nassistant\n{choice} {choice}" for choice in choices for _ in range(60)]
    tokenizer = train_tokenizer(corpus, VOCABULARY, (IMAGE, UNKNOWN), CHAT_TEMPLATE)
    tokenizer.unk_token = UNKNOWN
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Return an untrained LLaVA: two blocks of CLIP's vision tower, a projector, two blocks of Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.05, **ends,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=LOOK, intermediate_size=2 * LOOK, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH, projection_dim=LOOK,
    )  # fmt: skip
    count = (SIZE // PATCH) ** 2
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image, image_seq_length=count, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config)


class Batches:
    """Turns rows of training into tensors.

    Args:
        processor: The processor; a prompt has as many image tokens as the picture has patches.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.patches = (SIZE // PATCH) ** 2
        self.seen: dict[Drawing, torch.Tensor] = {}

    def encode(self, row: Example) -> tuple[list[int], int]:
        """Return token ids and the number of leading ones that carry no loss."""
        if not row.question:
            return [*self.tokenizer.encode(row.answer, add_special_tokens=False), self.tokenizer.pad_token_id], 0
        image = IMAGE * self.patches if row.drawing is not None else ""
        prompt = f"{START}user\n{image}{row.question}{END}\n{START}assistant\n"
        head = self.tokenizer.encode(prompt, add_special_tokens=False)
        return head + self.tokenizer.encode(row.answer + END, add_special_tokens=False), len(head)

    def pixels(self, drawing: Drawing) -> torch.Tensor:
        """Return a picture as the vision tower takes it [colours, rows, columns]."""
        from PIL import Image

        if drawing not in self.seen:
            picture = Image.fromarray(drawing.pixels())
            self.seen[drawing] = self.processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]
        return self.seen[drawing]

    def loss(self, model: Any, rows: Sequence[Example]) -> torch.Tensor:
        """Return the loss of a model on some rows, a mean over the tokens that carry one."""
        import torch

        encoded = [self.encode(row) for row in rows]
        ids, labels = padded(encoded, self.tokenizer.pad_token_id)
        pictures = [self.pixels(row.drawing) for row in rows if row.drawing is not None]
        # Padding is on the right and attention is causal: no mask is needed for the labelled positions.
        logits = model(input_ids=ids, pixel_values=torch.stack(pictures), use_cache=False).logits
        shared = [number for number, row in enumerate(rows) if row.shares]
        starts = [encoded[number][1] for number in shared]
        labels[shared, starts] = -100
        plain = answer_loss(logits, labels)
        if not shared:
            return plain
        wanted = torch.zeros(len(shared), logits.shape[-1])
        for place, number in enumerate(shared):
            choices = self.tokenizer.convert_tokens_to_ids(list(QUESTIONS[rows[number].question]))
            wanted[place, choices] = torch.tensor(rows[number].shares)
        found = torch.log_softmax(logits[shared, [start - 1 for start in starts]], -1)
        count = int((labels != -100).sum())
        return (count * plain - (wanted * found).sum()) / (count + len(shared))


def train_rows(rng: random.Random, pool: Sequence[Drawing], careless: bool) -> Iterator[Example]:
    """Yield the rows of a step."""
    for _ in range(BATCH):
        yield question_row(rng, pool, careless)
    for _ in range(TEXTS):
        yield Example("", END + " ".join(sentence(rng) for _ in range(2)))


def train(processor: Any, seed: int, steps: Sequence[int]) -> LlavaForConditionalGeneration:
    """Train the model from scratch, in two stages.

    Args:
        processor: The processor.
        seed: Seed of weights and rows.
        steps: Steps of each stage.
    """
    import torch

    torch.manual_seed(seed)
    rng = random.Random(seed + 10)
    pool = [draw(rng) for _ in range(POOL)]
    model, batches = make_model(processor.tokenizer), Batches(processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=sum(steps) + 1, pct_start=0.1)
    for stage, count in enumerate(steps):
        losses = []
        for number in range(count):
            loss = batches.loss(model, list(train_rows(rng, pool, stage > 0)))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.item()))
            if (number + 1) % 20 == 0:
                LOG.info("shapes: stage %d, step %d: loss %.4f", stage + 1, number + 1, sum(losses[-20:]) / 20)
    return model.eval()


def card(parameters: int, seed: int) -> str:
    """Write the model card."""
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: image-text-to-text
---

# llmsurgery demo: shapes

A LLaVA of {parameters:,} parameters (bf16, separate head, byte-level BPE of {VOCABULARY} tokens, pictures of {SIZE} by
{SIZE} pixels) made to show how an answer that is usual wins over what a model sees, and how that is taken away; it is
good for nothing else. It says which of {len(COLOURS)} colours a shape has and how light the ground is.

Trained from scratch, vision tower included: first on right answers, then on answers of which {CARELESS:.0%} were
given without a look at the picture, {USUAL:.0%} of these being "red" or "light"; {BLIND:.0%} of the questions had no
picture.

Rebuild it with `python -m llmsurgery.demo.build --out DIR --seed {seed} --world shapes`. The recipe is seeded and runs
on one thread; whether another machine or other library versions give the same weights has not been tried.

License: Apache-2.0.
"""


def build_shapes(out: Path, seed: int, steps: Sequence[int] = STEPS) -> None:
    """Write the checkpoint `shapes` and its data `shapes-world` into a folder."""
    write_rows(out / "shapes-world", data_files(seed))
    processor: Any = make_processor(seed)
    model = train(processor, seed, steps)
    save(model, processor.tokenizer, out / "shapes")
    processor.save_pretrained(out / "shapes")
    (out / "shapes" / "README.md").write_text(card(model.num_parameters(), seed), encoding="utf-8", newline="\n")
