"""Figures before and after: scoring, generation, metrics, gates."""
