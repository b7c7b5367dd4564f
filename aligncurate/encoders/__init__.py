"""Image-text encoders: loading them, running their towers, tokenizing, and the list of known models."""
