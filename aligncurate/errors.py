"""Every exception that AlignCurate raises on purpose, as one tree.

    AlignCurateError
    ├── UserError (a ValueError)     what the user gave cannot be used; exit code 2
    │   └── NoPairsError             a file holds no image-text pairs; in a folder it is skipped with a notice
    ├── RunError (a RuntimeError)    a run could not finish; what it committed is kept; exit code 1
    │   ├── ShardError               an input shard could not be read; the other shards go on
    │   └── WorkerError              a worker process died, for example out of memory
    ├── NonFiniteError (a RuntimeError)  the training loss or its gradient is not finite; exit code 1
    └── ImageError                   one image cannot be used; it becomes the status of its row

The command line handles the tree in one place (`aligncurate.cli.app`): one sentence, no traceback. Every message is
that sentence: what was wrong, where (file, key, row), what to do.
"""

from __future__ import annotations


class AlignCurateError(Exception):
    """Base of all exceptions below."""


class UserError(AlignCurateError, ValueError):
    """Something the user gave cannot be used. The command line prints it and exits with code 2."""


class NoPairsError(UserError):
    """A whole file that holds no image-text pairs, or is of another kind. In a folder it is skipped with a notice."""


class RunError(AlignCurateError, RuntimeError):
    """A run could not finish. What it committed is kept, and the same command continues from there; exit code 1."""


class ShardError(RunError):
    """A whole input shard could not be read. Other shards go on; a rerun tries this one again."""


class WorkerError(RunError):
    """A worker process ended before its work did, for example because the system ran out of memory."""


class NonFiniteError(AlignCurateError, RuntimeError):
    """The training loss or its gradient is not finite; the message names the step and the samples' keys."""


class ImageError(AlignCurateError):
    """An image that cannot be used.

    Attributes:
        status: the status that its row gets, a value of `aligncurate.dataset.record.Status`.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status
