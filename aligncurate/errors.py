"""The errors that are meant for the user: one sentence that says what, where and what to do."""


class UserError(ValueError):
    """Something the user gave cannot be used. The command line prints it and exits with code 2."""


class ShardError(RuntimeError):
    """A whole input shard could not be read. Other shards go on; a rerun tries this one again."""


class WorkerError(RuntimeError):
    """A worker process ended before its work did, for example because the system ran out of memory."""
