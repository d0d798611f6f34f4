"""What a caller asks for. No heavy import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """One operation on one model, as the command line or the Python API gives it.

    Attributes:
        task: Task ("unlearn").
        method: Method name.
        model: Directory, `.gguf` file or hub id; None for the embedded demo.
        data: Data name ("forget", "retain", "text") -> path.
        out: Output directory; None for a generated name.
        settings: Hyperparameters by name, strings or values; names with the prefix `eval.` are evaluation settings.
        seed: Seed of everything random.
        device: "auto", "cpu", "cuda" or "cuda:i".
        dtype: "auto", "float32", "bfloat16" or "float16".
        batch_size: Rows per forward, or None for the defaults.
        dry_run: Plan from headers and data only.
        require: Gates.
        until: Stop rule; None for the method's own, "none" for no rule.
        link: Hard-link untouched files.
        force: Replace an existing output.
        save: "full", "patch" or "adapter": what is published.
        undo: Keep undo data beside a full result.
        keep_partial: Keep the checkpoint under its partial name when a gate fails.
        trust_remote_code: Run model code that the checkpoint brings.
    """

    task: str
    method: str
    model: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    out: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    dry_run: bool = False
    require: tuple[str, ...] = ()
    until: str | None = None
    link: bool = False
    force: bool = False
    save: str = "full"
    undo: bool = True
    keep_partial: bool = False
    trust_remote_code: bool = False
