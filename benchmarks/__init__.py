"""Measurements of speed, memory and effect; each writes one JSON file under `results/`."""
