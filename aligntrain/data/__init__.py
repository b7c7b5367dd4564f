"""From curated pairs to batches: the tokenized index, the plan of an epoch, the batch reader."""
