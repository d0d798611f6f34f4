"""PINE: inference whose answer does not depend on the order in which interchangeable parts of a prompt are listed.

Paper: "Eliminating Position Bias of Language Models: A Mechanistic Approach", arXiv 2407.01100 (ICLR 2025).

This is no edit of weights. It changes how attention is computed, by where the parts of each prompt begin and end, and
no checkpoint can hold that: there is no output directory, no patch and nothing to export. It is run by

    llmsurgery eval MODEL --mcq DATA --position-invariant

and from Python, for prompts of any kind, by `llmsurgery.compute.position_invariant` (`invariant_states`,
`generate_invariant`, or `position_invariant` around the model's own forward). What it is good for here is the audit: it
tells how often an answer depends on the order alone, and so whether a debiasing of weights is worth it.

A prompt is a prefix, k segments and a suffix. Segments see each other in both directions and are causal inside; a query
sees a segment the closer the more it attends to it without rotary positions. By induction over the layers no state
depends on the listing. Letters inside of segments are content: a model that prefers the letter A keeps doing so (see
`pine.order_flips`), and `debias --method pride` takes that away.

It needs rotary positions (Llama, Mistral, Qwen, Gemma, Phi-3, OLMo 2, GPT-NeoX, ...). With one segment the results are
those of the model's own attention, which is checked on each model before anything is measured.

What differs from the released code (wzq016/PINE):

- It is one attention function for every architecture, where the code copies the model classes of Llama and Qwen-2, and
  it reads the model's own rotary tables, so that no kind of scaling is left out.
- Keys are rotated once and queries turned for every segment, where the code rotates all keys for each suffix token.
- Importances are in fp32, and ties are broken by the segments' tokens, not by the order of the listing.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmsurgery.methods.base import MethodSpec


@dataclass(frozen=True)
class PineConfig:
    """PINE has no hyperparameters."""


class Pine:
    """PINE as an entry of the list of methods; it has no functions that edit."""

    spec = MethodSpec(
        name="pine",
        task="eval",
        summary="answer regardless of the order of options: inference alone, no weight changes, nothing to export",
        paper="Eliminating Position Bias of Language Models: A Mechanistic Approach, arXiv 2407.01100",
        needs=("mcq", "position-invariant"),
        export="none",
        trained=False,
    )
    config_type: type = PineConfig
