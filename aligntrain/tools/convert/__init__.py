"""Checkpoints of other codes to this package's layout and back; a file for each foreign format."""
