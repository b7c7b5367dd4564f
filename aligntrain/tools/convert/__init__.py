"""Convert checkpoints of other projects to this package's layout and back; one file per foreign format."""
