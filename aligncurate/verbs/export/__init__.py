"""The verb `export`: one file per output format."""
