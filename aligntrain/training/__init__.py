"""The training loop and its parts: optimizer, ranks, checkpoints, metrics."""
