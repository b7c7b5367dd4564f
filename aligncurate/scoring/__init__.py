"""From one shard of a source to one scored part."""
