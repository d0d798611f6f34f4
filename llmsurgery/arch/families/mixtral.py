"""Mixtral: Mistral with routed experts in every block; the router's top-k weights are renormalised.

Stored per expert as w1 (gate), w3 (up) and w2 (down) under `block_sparse_moe`; transformers holds all experts of a
block in two parameters under `mlp`.
"""

from llmsurgery.arch.spec import Family, Fused

FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    layers_key="num_hidden_layers",
    roles={
        "embed": "model.embed_tokens",
        "norm.attn": "model.layers.{layer}.input_layernorm",
        "attn.q": "model.layers.{layer}.self_attn.q_proj",
        "attn.k": "model.layers.{layer}.self_attn.k_proj",
        "attn.v": "model.layers.{layer}.self_attn.v_proj",
        "attn.o": "model.layers.{layer}.self_attn.o_proj",
        "norm.mlp": "model.layers.{layer}.post_attention_layernorm",
        "router": "model.layers.{layer}.mlp.gate",
        "expert.gate": "model.layers.{layer}.mlp.experts",
        "expert.up": "model.layers.{layer}.mlp.experts",
        "expert.down": "model.layers.{layer}.mlp.experts",
        "norm.final": "model.norm",
        "lm_head": "lm_head",
    },
    stored={
        "router": "model.layers.{layer}.block_sparse_moe.gate",
        "expert.gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1",
        "expert.up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3",
        "expert.down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2",
    },
    fused={
        "expert.gate": Fused("gate_up_proj", 0, 2),
        "expert.up": Fused("gate_up_proj", 1, 2),
        "expert.down": Fused("down_proj"),
    },
    experts_keys=("num_local_experts", "num_experts"),
    stored_prefixes=(("model.", "model."), ("model.", "")),
)
