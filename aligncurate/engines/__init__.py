"""Engines run one function over many shards, all with the same call contract (`contract.py`)."""
