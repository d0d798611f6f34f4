"""Training: what may move, one loop for every trained method."""
