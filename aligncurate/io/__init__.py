"""Files: local and remote storage, atomic writes and claimed folders, tars."""
