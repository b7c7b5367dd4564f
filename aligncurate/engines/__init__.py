"""Engines run a function over shards: `local` in threads, `processes` in processes of this machine."""
