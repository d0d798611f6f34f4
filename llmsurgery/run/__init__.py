"""Run an operation from request to published checkpoint."""
