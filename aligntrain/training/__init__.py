"""The training loop and what it needs: optimizer, ranks, checkpoints, metrics."""
