"""Edits: what methods return, and the one place where they become bytes."""
