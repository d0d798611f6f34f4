"""What a method is: a spec, a config, and three functions. No heavy import.

A method of the task `redirect` needs "pairs" in place of rows; one that has to check them before any long work has
also `check_pairs(config, encoder, pairs)`, which raises. One whose pairs need no target has `concepts(config, encoder,
pairs)` in its place, which returns what `concept.prob` is measured on. A method of the task `debias` needs "mcq" or
"contrast", and has `check_asked(config, encoder, given)`, which raises. One whose hyperparameters depend on the
model has `settle(config, structure)`, which returns the config with all of them filled in. One that trains a model
which it has made smaller tells the prediction of memory what trains: `moved(config, structure)` are the tensors,
`trained_rows(prepared)` the rows, `trained_model(config, structure, model)` the model, all on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from llmsurgery.arch.adapter import Adapter
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.compute.cache import StatisticsCache
    from llmsurgery.compute.progress import Progress
    from llmsurgery.compute.stream import StreamedModel
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.contrast import Contrast
    from llmsurgery.data.mcq import Choices
    from llmsurgery.data.pairs import Pair
    from llmsurgery.data.records import Row
    from llmsurgery.edits.kinds import Edit
    from llmsurgery.evaluate.pictured import PicturedSet
    from llmsurgery.evaluate.recovery import Recovery
    from llmsurgery.train.session import Session
    from llmsurgery.train.trainable import ReadTensor


@dataclass(frozen=True)
class MethodSpec:
    """What `llmsurgery methods` says of a method.

    Attributes:
        name: Name on the command line.
        task: Task, as in the command ("unlearn").
        summary: One sentence.
        paper: Title and arXiv id.
        needs: Data that must be given ("forget").
        uses: Data that it uses if given ("retain").
        export: "plain", "adapter", "processor", "bundle" or "none"; that of the default form.
        trained: Whether it trains, and so needs gradients.
        demo_settings: Hyperparameters for the embedded demo that differ from the defaults.
        until: Stop rule when none is given, for trained methods.
        presets: Preset name -> hyperparameters that differ from the defaults.
        demo: Name of the embedded checkpoint that it runs on without a MODEL.
        lr_scale: Factor of the step size that suits most methods, where none is given.
        one_expert: Whether it moves one routed expert and its router, chosen by the data; it needs such experts.
        sequences: Sequences per forget row that a step runs at once (2: the row and a template answer to it), beside
            the retain rows; the prediction of memory counts with it.
        forms: Value of the setting `form` -> kind of export, for a method that has several.
        roles: Roles of which a model must have one; empty: any model will do.
        selects: Whether the data decide which of the planned tensors change; the plan is then an upper bound.
        lacks: Roles that a model must not have.
        streams: Whether it can run on a model that is read block by block, and plans from headers alone.
        targetless: Whether pairs need no target: the name alone says what is to change.
        models: Further models that it needs ("aligned", "base", "unaligned"), each of the source's shapes.
        walks: Whether it can prune a model that is read block by block (eval.figures=streamed).
        adapter: Whether MODEL is a LoRA adapter, and the model called "aligned" its base.
        structured: Whether it makes matrices smaller or fewer, so that the result may be faster.
        refuses: Dtypes ("float16") that it can neither compute in nor store its result in.
        pictures: Whether it is for models that see pictures; all other methods are for text models.
        recovers: Whether it trains on request, when its own work is done: where `max_steps` or `epochs` is above 0.
    """

    name: str
    task: str
    summary: str
    paper: str
    needs: tuple[str, ...]
    export: str
    trained: bool
    uses: tuple[str, ...] = ()
    demo_settings: Mapping[str, object] = field(default_factory=dict)
    until: str | None = None
    presets: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    demo: str = "model"
    lr_scale: float = 1.0
    one_expert: bool = False
    sequences: int = 1
    forms: Mapping[str, str] = field(default_factory=dict)
    roles: tuple[str, ...] = ()
    selects: bool = False
    lacks: tuple[str, ...] = ()
    streams: bool = False
    targetless: bool = False
    models: tuple[str, ...] = ()
    walks: bool = False
    adapter: bool = False
    structured: bool = False
    refuses: tuple[str, ...] = ()
    pictures: bool = False
    recovers: bool = False

    def trains(self, config: object) -> bool:
        """Return whether a run with this config trains."""
        training = getattr(config, "training", None)
        asked = getattr(training, "max_steps", 0) or getattr(training, "epochs", 0)
        return self.trained or (self.recovers and bool(asked))

    def export_of(self, config: object) -> str:
        """Return the kind of export of a run with this config."""
        return self.forms.get(getattr(config, "form", ""), self.export)

    @property
    def plain_form(self) -> str | None:
        """The value of `form` that ends in plain weights, None without a choice."""
        return next((form for form, kind in self.forms.items() if kind == "plain"), None)


@dataclass(frozen=True)
class OtherModel:
    """A further model of the source's architecture and shapes.

    Attributes:
        read: Reads a stored tensor by the source's name, as float32, rounded to the dtype that the source stores.
        load: Loads it as the source is loaded; it lives as long as the caller keeps it.
        stored: The names of the source that it has a tensor for; a tied head may be missing.
    """

    read: ReadTensor
    load: Callable[[], PreTrainedModel]
    stored: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Operation:
    """What a method receives besides its config.

    Attributes:
        structure: The checkpoint's roles.
        source_config: The checkpoint's parsed config.json.
        read: Reads a stored tensor as float32.
        model: The loaded source model; the method may change it in memory.
        encoder: Turns rows into token ids.
        data: Data name -> rows ("forget", "retain").
        seed: Seed of everything random.
        progress: Told of long work.
        training: What `llmsurgery.train.loop.train` takes: micro-batch, stop rule, guard and kept states.
        statistics: Where statistics of the source model are kept; None keeps none.
        pairs: What is redirected where.
        choices: Questions with options that it may learn from, or None.
        contrast: Contrasting texts that it may learn from.
        streamed: The source model read block by block, in place of a loaded one (`model` is its stock model, whose
            blocks are empty unless they run or are held); None if it is loaded.
        beside: Directory of what earlier operations kept beside the source; it may not exist.
        history: The operations that made the source, oldest first, as its manifest tells them.
        models: Further models by name ("aligned", "base", "unaligned").
        adapter: The adapter that is the source, for a method of adapters; `read`, `model` and `models` are then the
            base with it merged, that in memory, and the base alone.
        recovery: Measures refusals and the task on a model in memory; None for other tasks.
        pictured: Questions about pictures that it may learn from, or None.
    """

    structure: Structure
    source_config: Mapping[str, object]
    read: ReadTensor
    model: PreTrainedModel
    encoder: Encoder
    data: Mapping[str, Sequence[Row]]
    seed: int
    progress: Progress
    training: Session
    statistics: StatisticsCache | None = None
    pairs: Sequence[Pair] = ()
    choices: Choices | None = None
    contrast: Sequence[Contrast] = ()
    streamed: StreamedModel | None = None
    beside: Path | None = None
    history: Sequence[Mapping[str, Any]] = ()
    models: Mapping[str, OtherModel] = field(default_factory=dict)
    recovery: Recovery | None = None
    pictured: PicturedSet | None = None
    adapter: Adapter | None = None


@dataclass(frozen=True)
class MethodResult:
    """What a method returns.

    Attributes:
        edits: The edits, in order.
        record: Facts about the run for the manifest (steps, losses, why it stopped).
        targets: The tensors that it chose out of its plan, None for all of them.
        beside: Small files to be kept beside a whole checkpoint, for later operations on it; name -> content.
        check: Called with the stored result, loaded again; raises if that is not what was meant.
    """

    edits: Sequence[Edit]
    record: Mapping[str, object]
    targets: Sequence[RoleTensor] | None = None
    beside: Mapping[str, bytes] = field(default_factory=dict)
    check: Callable[[PreTrainedModel], None] | None = None


class Described(Protocol):
    """What `llmsurgery methods` lists: a method, or a procedure of inference that changes no weight."""

    spec: MethodSpec
    config_type: type


class Method(Described, Protocol):
    """A method: plan from headers, prepare from data before any model is loaded, edit with the model."""

    def plan(self, config: object, structure: Structure) -> Sequence[RoleTensor]:
        """Return the stored tensors that the method may change, from headers alone."""

    def prepare(self, config: object, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> object:
        """Check and encode the data; every error about it is raised here, before any long work."""

    def edit(self, config: object, operation: Operation, prepared: object) -> MethodResult:
        """Run the method and return its edits."""
