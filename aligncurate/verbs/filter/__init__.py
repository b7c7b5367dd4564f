"""The verb `filter`: which rows of a dataset are kept."""
