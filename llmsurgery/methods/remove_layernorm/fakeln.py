"""FakeLN: train until every norm divides by a constant, and store that in a stock checkpoint.

Paper: "Transformers Don't Need LayerNorm at Inference Time: Scaling LayerNorm Removal to GPT-2 XL and the Implications
for Mechanistic Interpretability", arXiv 2507.02559; before it "You can remove GPT2's LayerNorm by fine-tuning", arXiv
2409.13710. With s(x) = sqrt(var x + eps) per token, a norm becomes

    y = (x - mean x) / sigma * g + b

one norm after the other, during ordinary next-token training of all weights on --corpus. All at once destroys the
model. The norm before attention goes for queries and keys first and for values later. Until a norm goes, its sigma
follows s(x), once a step: sigma <- momentum sigma + (1 - momentum) mean s. The order is

    all norms before MLPs, then before attention for q and k, then for v, then the last: 3 n + 1 events for n blocks

at steps `start`, `gap_mlp`, `gap_qk`, `gap_v`; what is not set is that of the GPT-2 of the next larger number of blocks
(presets small, medium, large, xl; `paper` is small). A schedule longer than `max_steps` runs at a faster `pace`. The
loss is CE + aux * mean (s - mean s)^2 over what the last norm reads: it flattens the norm of the residual, the first
position included. Events wait while the cross-entropy is `max_rise` nats above that before the last event.

The result, to be loaded as `GPT2LMHeadModel.from_pretrained(OUT)`, in two forms that say the same (`form`):

    eps       epsilon s^2 for the whole config and weights g s / sigma: sqrt(var + s^2) is s up to var / (2 s^2)
    folded    gain, constant, bias and the mean go into the matrices that read the norm, whose weight becomes s: these
              norms may be left out altogether. The last one keeps its gain, since the head is the embedding.

The real models are gpt2, gpt2-medium, gpt2-large and gpt2-xl (`llmsurgery remove-layernorm gpt2 --corpus text.jsonl`)
and GPT-NeoX ones such as EleutherAI/pythia-70m. RMSNorm models (Llama, Qwen) are an experiment of this toolkit: y = x /
sigma * g with sqrt(mean x^2) for s, no mean and no bias. No published result shows that it works at scale; the first
token's massive activations are the obstacle. Routed experts are refused.

float16 is refused, stored or computed: g s / sigma is beyond 65504. In bfloat16 the result is that of training to about
a hundredth; its error is printed. Any later training of the result is ill-conditioned: `llmsurgery revert` it first.
`llmsurgery linearity OUT --source MODEL` proves what was reached.

What differs from the released code, and why:

- "Position" vectors of sigma there have one entry per channel: the special value hits channel 0 of every token.
  `special_first=position` does what was meant: the first position has a sigma of its own, and so have end tokens where
  values are read, until the last norm is gone. The default is what the released models were made with, one number.
- Its sigma moves with every call, in evaluation too, and goes on moving for values when queries and keys are already
  switched. Here it moves once a step, in training alone, and is locked at the first switch.
- Only norms and what reads values are changed, by hooks on the stock model: masks, caches and dropout stay its own.
- Weights train in fp32 (under autocast where the model computes in bf16): in pure bf16 small steps are lost.
- The mean s in the loss is that of a micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmsurgery.errors import UsageError
from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.registry import register
from llmsurgery.train.config import OPTIMIZERS, option
from llmsurgery.train.norm_schedule import SIZES, Event, events_of, preset_of, size_for

if TYPE_CHECKING:
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.methods.norm_training import Corpus

BY_SIZE = "none: that of the paper for this number of blocks"


@dataclass(frozen=True)
class FakelnConfig:
    """Hyperparameters of FakeLN; `llmsurgery methods fakeln` prints them with their help."""

    form: str = option(
        "eps", "how the result is stored: a large epsilon, or folded into the matrices", ("eps", "folded")
    )
    scale: float = option(1e6, "s of the stored form: epsilon is its square", minimum=1e4, maximum=1e8)
    special_first: str = option(
        "none", "position: the first position and end tokens keep a sigma of their own for longer", ("none", "position")
    )
    max_steps: int | None = option(None, f"optimizer steps; {BY_SIZE}", minimum=1)
    start: int | None = option(None, f"steps before the first norm goes; {BY_SIZE}", minimum=0)
    gap_mlp: int | None = option(None, f"steps between norms before MLPs; {BY_SIZE}", minimum=0)
    gap_qk: int | None = option(None, f"steps between norms before attention, for q and k; {BY_SIZE}", minimum=0)
    gap_v: int | None = option(None, f"the same for v; {BY_SIZE}", minimum=0)
    pace: float | None = option(
        None, "factor of all these steps; none: 1, less where that is needed to end within max_steps", minimum=0
    )
    momentum: float | None = option(None, f"share of the old sigma at every step; {BY_SIZE}", minimum=0, maximum=1)
    aux: float | None = option(None, f"weight of the loss that flattens the last norm's input; {BY_SIZE}", minimum=0)
    max_rise: float = option(
        0.5, "rise of the cross-entropy since the last event, in nats, at which events wait; 0: never", minimum=0
    )
    lr: float | None = option(None, f"step size of AdamW; {BY_SIZE}, larger for models narrower than 768", minimum=0)
    lr_end: float | None = option(None, f"share of it that the cosine ends at; {BY_SIZE}", minimum=0, maximum=1)
    warmup_steps: int | None = option(None, f"steps of linear warm-up; {BY_SIZE}", minimum=0)
    batch_size: int = option(16, "windows per optimizer step; --batch-size sets the windows per forward", minimum=1)
    window: int = option(1024, "tokens of a window, at most the model's context", minimum=2)
    held: int = option(16, "windows of --corpus that are only measured, at most a tenth", minimum=1)
    control: bool = option(
        False, "first train as long with all norms in place, and measure that beside; doubles the time"
    )
    weight_decay: float = option(0.01, "decoupled weight decay", minimum=0)
    clip: float = option(1.0, "largest gradient norm; 0: no clipping", minimum=0)
    optimizer: str = option("adamw", "adamw8bit holds the moments in 8 bits (bitsandbytes)", OPTIMIZERS)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    save_every: int = option(20, "steps between kept states, which --resume goes on from; 0: keep none", minimum=0)


@register
class Fakeln:
    """FakeLN as a method of the toolkit."""

    spec = MethodSpec(
        name="fakeln",
        task="remove-layernorm",
        summary="train until every norm divides by a constant, stored in a stock checkpoint",
        paper="Transformers Don't Need LayerNorm at Inference Time: Scaling LayerNorm Removal to GPT-2 XL and the "
        "Implications for Mechanistic Interpretability, arXiv 2507.02559",
        needs=("corpus",),
        export="plain",
        trained=True,
        demo="layernorm",
        demo_settings={"max_steps": 80, "control": True},
        presets={**{name: preset_of(size) for name, size in SIZES.items()}, "paper": preset_of(SIZES["small"])},
        roles=("norm.attn",),
        lacks=("router", "norm.q_a", "norm.kv_a"),
        refuses=("float16",),
    )
    config_type = FakelnConfig

    def settle(self, config: FakelnConfig, structure: Structure) -> FakelnConfig:
        """Fill in what depends on the size of the model.

        Raises:
            UsageError: The schedule does not fit into the steps.
        """
        size = size_for(structure.layers)
        width = next(tensor.shape[-1] for tensor in structure.tensors if tensor.role == "embed")
        values: dict[str, Any] = {
            name: getattr(size, name)
            for name in (
                "max_steps",
                "start",
                "gap_mlp",
                "gap_qk",
                "gap_v",
                "momentum",
                "aux",
                "lr_end",
                "warmup_steps",
            )
            if getattr(config, name) is None
        }
        if config.lr is None:
            values["lr"] = float(f"{size.lr * max(1.0, 768 / width) ** 0.5:.2g}")
        config = dataclasses.replace(config, **values)
        steps = config.max_steps
        assert steps is not None
        if config.pace is None:
            last = events(dataclasses.replace(config, pace=1.0), structure)[-1].step
            # A third of the steps is left for what the last switch has upset.
            fitting = 1.0 if last < steps else float(f"{steps * 2 / 3 / last:.4g}")
            config = dataclasses.replace(config, pace=fitting)
        if (late := events(config, structure)[-1].step) >= steps:
            raise UsageError(
                f"the last norm would go at step {late}, and there are {steps}",
                "every norm has to go before the end of training",
                "raise max_steps, lower start, gap_mlp, gap_qk or gap_v, or leave pace to the method",
            )
        return config

    def plan(self, config: FakelnConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return every weight: all of them train.

        Raises:
            UnsupportedError: The model has routed experts, or norms that its config does not reach.
        """
        from llmsurgery.methods.norm_training import require_supported

        require_supported(self.spec, structure)
        return structure.select(("all",))

    def further_parameters(self, config: FakelnConfig, structure: Structure) -> int:
        """Return how many entries train; the prediction of memory counts them."""
        return sum(tensor.parameters for tensor in structure.select(("all",)))

    def prepare(self, config: FakelnConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> Corpus:
        """Cut the corpus into windows, and hold some of them back.

        Raises:
            InputError: It has fewer tokens than one window.
        """
        from llmsurgery.methods.norm_training import cut_corpus

        return cut_corpus(config, encoder, data["corpus"])

    def edit(self, config: FakelnConfig, operation: Operation, prepared: Corpus) -> MethodResult:
        """Train, and return all weights with norms that are affine maps."""
        from llmsurgery.methods.norm_training import remove_norms

        return remove_norms(config, operation, prepared, events(config, operation.structure))


def events(config: FakelnConfig, structure: Structure) -> list[Event]:
    """Return the schedule of a settled config."""
    assert config.start is not None
    assert config.gap_mlp is not None
    assert config.gap_qk is not None
    assert config.gap_v is not None
    assert config.pace is not None
    gaps = (config.gap_mlp, config.gap_qk, config.gap_v)
    return events_of(structure.layers, config.start, gaps, config.special_first == "position", config.pace)
