"""Architectures as tables of roles."""
