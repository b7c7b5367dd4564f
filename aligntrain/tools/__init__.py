"""Tools around training: generate, evaluate, preview, estimate memory, convert checkpoints."""
