"""Qwen2 and Qwen2.5: Llama's layout with biases on q, k and v; the small sizes tie the head to the embedding."""

from llmsurgery.arch.spec import Family

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    layers_key="num_hidden_layers",
    roles={
        "embed": "model.embed_tokens",
        "norm.attn": "model.layers.{layer}.input_layernorm",
        "attn.q": "model.layers.{layer}.self_attn.q_proj",
        "attn.k": "model.layers.{layer}.self_attn.k_proj",
        "attn.v": "model.layers.{layer}.self_attn.v_proj",
        "attn.o": "model.layers.{layer}.self_attn.o_proj",
        "norm.mlp": "model.layers.{layer}.post_attention_layernorm",
        "mlp.gate": "model.layers.{layer}.mlp.gate_proj",
        "mlp.up": "model.layers.{layer}.mlp.up_proj",
        "mlp.down": "model.layers.{layer}.mlp.down_proj",
        "norm.final": "model.norm",
        "lm_head": "lm_head",
    },
    stored_prefixes=(("model.", "model."), ("model.", "")),
)
