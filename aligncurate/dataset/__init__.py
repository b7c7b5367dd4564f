"""Datasets: folders of Parquet parts with a manifest. Columns, parts, reading, writing, and pointers to images."""
