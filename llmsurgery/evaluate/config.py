"""Settings of the figures. No heavy import: the command line reads this."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llmsurgery.train.config import option

PROTOCOLS = ("own", "tofu", "muse", "ou")


@dataclass(frozen=True)
class EvaluationConfig:
    """How figures are measured; `--set eval.NAME=VALUE` for operations, `--set NAME=VALUE` for `eval`.

    Settings that are None depend on `protocol`; `settle` fills them in.
    """

    protocol: str = option(
        "own", "conventions: own, or those of tofu, muse or ou (open-unlearning), on whole sets", PROTOCOLS
    )
    truth_ratio_mean: str | None = option(
        None, "mean over wrong answers; default geometric, tofu: arithmetic", ("geometric", "arithmetic")
    )
    truth_ratio: bool = option(True, "score paraphrased and wrong answers where the rows have them")
    min_k: float = option(0.4, "share of the least probable tokens that min_k_auc looks at", minimum=0.01, maximum=1)
    rows: int | None = option(None, "forget and retain rows that are read; 0: all; default all, tofu: 300", minimum=0)
    text_rows: int = option(40, "passages of --text that are read", minimum=1)
    text_tokens: int = option(256, "tokens of each passage that are read", minimum=9)
    membership_tokens: int = option(2048, "tokens of a plain text that min_k_auc reads", minimum=2)
    generate: bool = option(True, "answer greedily, for ROUGE-L and the examples on screen")
    generation_rows: int | None = option(
        None, "rows of a set that are answered at most; 0: all; default 64, all with a protocol", minimum=0
    )
    generation_tokens: int = option(200, "new tokens per answer at most", minimum=1)
    mcq_template: str = option("", "file with the prompt of --mcq; default: the method's, or the shipped one")
    mcq_rows: int | None = option(None, "questions of --mcq that are measured; 0 or none: all", minimum=0)
    position_invariant: bool = option(
        False, "ask --mcq by position-invariant inference (PINE) too, and count answers that change with the order"
    )
    figures: str = option(
        "all",
        "edit: of a redirection measure only what the edited blocks show; streamed: prune and measure a model that is "
        "read block by block",
        ("all", "edit", "streamed"),
    )
    scorer: str | None = option(
        None, "score of --task rows; default: the method's, else probability", ("probability", "exact", "rouge_l")
    )
    task_rows: int = option(64, "rows of --task that are scored at most; 0: all", minimum=0)
    refusal_rows: int = option(
        64, "prompts of --harmful and of --harmless that are answered at most; 0: all", minimum=0
    )
    refusal_tokens: int = option(32, "new tokens per answer to these at most", minimum=1)
    refusal_markers: tuple[str, ...] = option((), "further texts that mark an answer as a refusal, in lower case")
    judge_seconds: int = option(600, "time that --judge has for all answers of a model", minimum=1)
    batch_size: int = option(8, "rows per forward; --batch-size overrides it", minimum=1)


def settle(config: EvaluationConfig) -> EvaluationConfig:
    """Fill in what the protocol decides, so that manifest and report name it."""
    tofu, own = config.protocol == "tofu", config.protocol == "own"
    chosen: dict[str, object] = {}
    if config.truth_ratio_mean is None:
        chosen["truth_ratio_mean"] = "arithmetic" if tofu else "geometric"
    if config.rows is None:
        chosen["rows"] = 300 if tofu else 0
    if config.generation_rows is None:
        chosen["generation_rows"] = 64 if own else 0
    return dataclasses.replace(config, **chosen)  # type: ignore[arg-type]
