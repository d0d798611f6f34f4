"""Settings of the figures. No heavy import: the command line reads this."""

from __future__ import annotations

from dataclasses import dataclass

from llmsurgery.train.config import option


@dataclass(frozen=True)
class EvaluationConfig:
    """How figures are measured; `--set eval.NAME=VALUE` for operations, `--set NAME=VALUE` for `eval`."""

    text_rows: int = option(40, "passages of --text that are read", minimum=1)
    text_tokens: int = option(256, "tokens of each passage that are read", minimum=9)
    generate: bool = option(True, "answer greedily, for ROUGE-L and the examples on screen")
    generation_rows: int = option(64, "rows that are answered at most", minimum=1)
    generation_tokens: int = option(200, "new tokens per answer at most", minimum=1)
    batch_size: int = option(8, "rows per forward; --batch-size overrides it", minimum=1)
