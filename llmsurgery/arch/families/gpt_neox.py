"""GPT-NeoX and Pythia: LayerNorm with bias, fused q/k/v, biases on every matrix, a separate head.

`attn.qkv` is ordered by head: the rows of q, k and v of head 0, then of head 1. With `use_parallel_residual`, the
usual case, attention and MLP both read the block's input, each through its own norm. The head is stored as
`embed_out` and loaded as `lm_head`. Old checkpoints carry causal masks and rotary frequencies as buffers.
"""

from llmsurgery.arch.spec import Family

FAMILY = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    layers_key="num_hidden_layers",
    roles={
        "embed": "gpt_neox.embed_in",
        "norm.attn": "gpt_neox.layers.{layer}.input_layernorm",
        "attn.qkv": "gpt_neox.layers.{layer}.attention.query_key_value",
        "attn.o": "gpt_neox.layers.{layer}.attention.dense",
        "norm.mlp": "gpt_neox.layers.{layer}.post_attention_layernorm",
        "mlp.up": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h",
        "mlp.down": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h",
        "norm.final": "gpt_neox.final_layer_norm",
        "lm_head": "lm_head",
    },
    stored={"lm_head": "embed_out"},
    buffers=(".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq"),
    stored_prefixes=(("gpt_neox.", "gpt_neox."), ("gpt_neox.", "")),
    norm_centres=True,
    norm_eps="layer_norm_eps",
    qkv_by_head=True,
)
