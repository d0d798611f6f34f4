"""GPT-2: LayerNorm with bias, fused q/k/v, learned positions, and every block matrix stored [inputs, outputs].

The published checkpoints store the blocks without the `transformer.` prefix that the module tree has, tie the head to
the embedding without saying so in config.json, and may carry the causal masks of old releases as buffers.
"""

from llmsurgery.arch.spec import Family

FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    layers_key="n_layer",
    tied_by_default=True,
    roles={
        "embed": "transformer.wte",
        "embed.position": "transformer.wpe",
        "norm.attn": "transformer.h.{layer}.ln_1",
        "attn.qkv": "transformer.h.{layer}.attn.c_attn",
        "attn.o": "transformer.h.{layer}.attn.c_proj",
        "norm.mlp": "transformer.h.{layer}.ln_2",
        "mlp.up": "transformer.h.{layer}.mlp.c_fc",
        "mlp.down": "transformer.h.{layer}.mlp.c_proj",
        "norm.final": "transformer.ln_f",
        "lm_head": "lm_head",
    },
    stored_prefixes=(("transformer.", "transformer."), ("transformer.", "")),
    buffers=(".attn.bias", ".attn.masked_bias"),
    transposed=frozenset({"attn.qkv", "attn.o", "mlp.up", "mlp.down"}),
    norm_centres=True,
    norm_eps="layer_norm_epsilon",
)
