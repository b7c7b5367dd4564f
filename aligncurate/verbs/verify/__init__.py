"""The verb `verify`: finds what is damaged in a dataset, and makes it again."""
