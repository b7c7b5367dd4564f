"""Engines run a function over shards: in threads or in processes of this machine."""
