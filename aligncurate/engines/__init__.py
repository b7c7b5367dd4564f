"""Engines run a function over shards: `local` on this machine."""
