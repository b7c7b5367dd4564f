"""Image-text data somebody already has: a file per form of input, and `detect.open_source` to tell which it is."""
