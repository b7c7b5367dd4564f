"""Files: local and remote storage, atomic writes, locked output folders, tars and Parquet."""
