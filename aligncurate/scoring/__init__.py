"""From one shard of a source to one part of a dataset, with scores or (`ingest`) without."""
