"""The call contract of all engines.

An engine is a module with `run(function, shards, *, workers)`. It calls `function(shard, check)` for every shard,
`workers` at a time, and yields an Outcome per shard as each is done. A ShardError becomes that shard's outcome and the
other shards continue; any other error stops the run. `check` raises Cancelled once the run was stopped, so the
function should call it now and then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from aligncurate.errors import ShardError

Item = TypeVar("Item")
Result = TypeVar("Result")

Check = Callable[[], None]
Function = Callable[[Item, Check], Result]


class Cancelled(Exception):
    """The run was stopped; the function's unfinished work is discarded."""


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """A shard's result, or the error that kept it from being read."""

    shard: Item
    result: Result | None
    error: ShardError | None
