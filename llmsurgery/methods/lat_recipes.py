"""Recipes of targeted LAT's authors (arXiv 2407.15549, aengusl/latent-adversarial-training at 53ac752)."""

from __future__ import annotations

from collections.abc import Mapping

EMBEDDING = "embedding"

_ADAPTERS: Mapping[str, object] = {
    "roles": ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"),
    "rank": 64,
    "alpha": 64.0,
    "inner_lr": 5e-2,
    "inner_weight_decay": 0.01,
    "lr": 2e-5,
    "kl_weight": 0.0,
    "batch_size": 16,
}
_JAILBREAK: Mapping[str, object] = {
    **_ADAPTERS,
    "attack_layers": (EMBEDDING, "8", "16", "24", "30"),
    "eps": 6.0,
    "sft_weight": 1.5,
    "fresh_optimizer": True,
    "templates": "refusal",
    "max_steps": 400,
}
_WMDP: Mapping[str, object] = {
    "inner_weight_decay": 0.01,
    "inner_lr": 5e-2,
    "attack_layers": ("7",),
    "attack_positions": "all",
    "eps": 2.0,
    "adversary_toward": 1.0,
    "adversary_away": 0.0,
    "kl_weight": 0.0,
    "lr": 5e-5,
    "max_steps": 800,
}
PRESETS: Mapping[str, Mapping[str, object]] = {
    "paper": {
        **_ADAPTERS,
        **_WMDP,
        "toward_weight": 0.0,
        "away_weight": 1.0,
        "sft_weight": 4.0,
        "batch_size": 4,
        "clip": 0.5,
        "fresh_optimizer": True,
        "max_length": 600,
    },
    "wmdp-rmu": {
        **_WMDP,
        "max_length": 768,
        "base": "rmu",
        "base_settings": ("layer=8", "steering=6.5", "retain_weight=1200", "positions=all"),
        "train": "full",
        "roles": ("mlp.down",),
        "layers": (6, 7, 8),
        "clip": 0.0,
    },
    "jailbreak": _JAILBREAK,
    "jailbreak-llama3": {
        **_JAILBREAK,
        "inner_lr": 1e-3,
        "attack_positions": "all",
        "sft_weight": 0.0,
        "kl_weight": 0.1,
        "kl_mode": "normalised",
        "lr": 8e-5,
    },
    "backdoor": {
        **_ADAPTERS,
        "base": "preference",
        "attack_layers": ("4", "12", "20", "28"),
        "eps": 1.5,
        "max_steps": 1024,
    },
}  # fmt: skip
