"""Whole runs: the data, models and recipes that put the packages to work."""
