"""Measurements that anybody can repeat, one command each: `python -m benchmarks.<name> --help`."""
