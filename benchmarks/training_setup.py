"""What both sides of `benchmarks.unlearning` start from: rows, settings, a loaded model, and a clock with a peak."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import Structure
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.load import load_model
from llmsurgery.compute.progress import Tick
from llmsurgery.data.chat import Encoded

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
    # 16 attack steps for 4 model steps by default.
    "lat": {"eps": 1.0, "pgd_steps": 2, "model_steps": 1},
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


STEPS = 2
"""Steps of a measurement; the first is not counted."""
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
        encoder: Stands for the tokenizer, of which losses need the id of padding alone.
    """

    model: PreTrainedModel
    structure: Structure
    checkpoint: Checkpoint
    encoder: Any = field(default_factory=lambda: SimpleNamespace(pad_id=0))


def load(path: Path) -> Loaded:
    """Load a checkpoint in fp32."""
    checkpoint = Checkpoint.open(path)
    structure = detect(checkpoint.config, checkpoint.tensors)
    model = load_model(path, torch.float32, torch.device("cpu"), buffers=structure.family.buffers)
    return Loaded(model, structure, checkpoint)


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _nothing() -> None:
    """Wait for nobody."""


@dataclass
class Clock:
    """Time of each step and peak of memory, of the call of `train` that is asked for; a sink of progress.

    The peak is that of the steps alone: the kernel's high-water mark is set back in front of them.

    Attributes:
        wait: Called between steps.
        resident: Bytes that the process holds with the model and nothing else.
        stage: How many calls of `train` come before the measured one.
        steps: Wall time and CPU seconds of each step.
        once: CPU seconds in front of the steps.
        before: High-water mark in front of the steps.
        peak: High-water mark of the steps.
    """

    wait: Callable[[], None] = _nothing
    resident: int = 0
    stage: int = 0
    steps: list[tuple[float, float]] = field(default_factory=list)
    once: float = 0.0
    before: int = 0
    peak: int = 0
    _last: tuple[float, float] = field(default_factory=lambda: (time.perf_counter(), time.process_time()))

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
                self.steps.append(self._lap())

        if measured:
            self.before = _peak_bytes()
            _, self.once = self._lap()
            Path("/proc/self/clear_refs").write_text("5")
        yield tick
        if measured:
            self.peak = _peak_bytes()

    def _lap(self) -> tuple[float, float]:
        """Return the time since the last turn, and wait for the next one."""
        wall, cpu = time.perf_counter() - self._last[0], time.process_time() - self._last[1]
        self.wait()
        self._last = (time.perf_counter(), time.process_time())
        return wall, cpu

    def result(self, first_loss: float) -> dict[str, Any]:
        """Return CPU and wall seconds of the steps but the first, peaks above the model, and the first loss."""
        return {
            "seconds": [cpu for _, cpu in self.steps[1:]],
            "wall_seconds": [wall for wall, _ in self.steps[1:]],
            "peak_bytes": float(self.peak - self.resident),
            "first_loss": first_loss,
            "once_seconds": self.once,
            "once_peak_bytes": float(self.before - self.resident),
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
