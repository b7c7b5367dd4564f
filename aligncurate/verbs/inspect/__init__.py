"""The verb `inspect`: what a dataset holds, measured in one pass over its scores."""
