"""What both sides of `benchmarks.unlearning` start from: rows, settings, a loaded model, and a clock with a peak."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import Structure
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.device import resident_bytes
from llmsurgery.compute.load import load_model
from llmsurgery.compute.progress import Tick
from llmsurgery.data.chat import Encoded

T = TypeVar("T")

SETTINGS: dict[str, dict[str, object]] = {
    # A token less likely than a guess is pushed on, as in the papers: the plain losses have no bound.
    "ga": {"max_forget_ce": 0.0},
    "graddiff": {"max_forget_ce": 0.0},
    "kl-min": {"max_forget_ce": 0.0},
    "dpo": {"alternatives": 1},
    "npo": {},
    "simnpo": {},
    "rmu": {"steering": 6.5},
    "undial": {},
    "loku": {},
    "flat": {},
    # 16 attack steps and 4 model steps by default; the ratio of the two kinds of work stays the same.
    "lat": {"eps": 1.0, "pgd_steps": 4, "model_steps": 1},
    "uld-assistant": {"strength": 1.0, "assistant_batch_size": 4},
    "uld-distillation": {"strength": 1.0, "assistant_steps": 1},
    # The span that the trace would choose has three eighths of the layers.
    "selective-amnesia": {"layers": tuple(range(11)), "max_forget_ce": 0.0},
    "uoe": {"base_settings": ("max_forget_ce=0",), "layers": (5,), "experts": (3,)},
}
"""Name -> what differs from the default settings; beside it, every run has its own number of steps and lr 1e-4."""


@dataclass(frozen=True)
class Case:
    """The size of a step.

    Attributes:
        rows: Forget rows, and retain rows, of a step.
        prompt: Tokens of a prompt.
        answer: Tokens of an answer.
    """

    rows: int
    prompt: int
    answer: int


CASES = {"short": Case(2, 32, 32), "long": Case(2, 32, 96)}


@dataclass(frozen=True)
class Rows:
    """Encoded rows of one length; `other` are the forget prompts with another answer."""

    forget: list[Encoded]
    other: list[Encoded]
    retain: list[Encoded]


def cut_rows(ids: Sequence[int], case: Case) -> Rows:
    """Cut a text into rows."""
    at = iter(ids)

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(at) for _ in range(count))

    def row(prompt: tuple[int, ...]) -> Encoded:
        return Encoded(prompt + take(case.answer), case.prompt, True)

    forget = [row(take(case.prompt)) for _ in range(case.rows)]
    other = [row(each.ids[: case.prompt]) for each in forget]
    return Rows(forget, other, [row(take(case.prompt)) for _ in range(case.rows)])


class InTurn(random.Random):
    """Draws in turn instead of at random: every step takes every row once, and so do both sides."""

    def __init__(self) -> None:
        super().__init__(0)
        self.drawn = 0

    def choice(self, seq: Any) -> Any:
        """Return the next one."""
        self.drawn += 1
        return seq[(self.drawn - 1) % len(seq)]


@dataclass(frozen=True)
class Loaded:
    """A loaded model and what is known of it.

    Attributes:
        model: The model.
        structure: Its roles.
        checkpoint: Its files.
        resident: Bytes that the process holds with the model loaded and nothing else.
    """

    model: PreTrainedModel
    structure: Structure
    checkpoint: Checkpoint
    resident: int
    encoder: Any = field(default_factory=lambda: SimpleNamespace(pad_id=0))


def load(path: Path) -> Loaded:
    """Load a checkpoint in fp32."""
    checkpoint = Checkpoint.open(path)
    structure = detect(checkpoint.config, checkpoint.tensors)
    model = load_model(path, torch.float32, torch.device("cpu"), buffers=structure.family.buffers)
    return Loaded(model, structure, checkpoint, resident_bytes())


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@dataclass
class Clock:
    """Time of each step and peak of memory, of the call of `train` that is asked for; a sink of progress.

    The peak is that of the steps alone: the kernel's high-water mark is set back in front of them.

    Attributes:
        stage: How many calls of `train` come before the measured one.
        times: Wall time and CPU seconds at the start and after every step.
        before: High-water mark in front of the steps.
        peak: High-water mark of the steps.
    """

    stage: int = 0
    times: list[tuple[float, float]] = field(default_factory=list)
    before: int = 0
    peak: int = 0
    origin: float = field(default_factory=time.process_time)

    def notice(self, message: str) -> None:
        """Take no notice."""

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Tick]:
        """Measure the training that is asked for."""
        del total
        measured = name == "training" and self.stage == 0
        self.stage -= name == "training"

        def tick(steps: int = 1, note: str = "") -> None:
            del steps, note
            if measured:
                self.read()

        if measured:
            self.start()
        yield tick
        if measured:
            self.peak = _peak_bytes()

    def start(self) -> None:
        """Begin to measure."""
        self.before = _peak_bytes()
        Path("/proc/self/clear_refs").write_text("5")
        self.read()

    def read(self) -> None:
        """Take the time."""
        self.times.append((time.perf_counter(), time.process_time()))

    def result(self, loaded: Loaded, first_loss: float) -> dict[str, float]:
        """Return seconds per step without the first, peaks above the loaded model, and the first loss."""
        steps = list(zip(self.times, self.times[1:], strict=False))[1:]
        wall, cpu = (sorted(end[i] - start[i] for start, end in steps)[len(steps) // 2] for i in (0, 1))
        return {
            "seconds": wall,
            "cpu_seconds": cpu,
            "peak_bytes": float(self.peak - loaded.resident),
            "first_loss": first_loss,
            "once_cpu_seconds": self.times[0][1] - self.origin,
            "once_peak_bytes": float(self.before - loaded.resident),
        }


def make_experts(path: Path) -> None:
    """Write a small mixture of experts with random weights: SmolLM2 has no experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=49152,
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
