"""The verb `join`: adds columns of another table to a dataset."""
