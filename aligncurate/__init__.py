"""AlignCurate: score image-text pairs with CLIP, give them alignment levels, curate and export them.

The functions have the names of the commands and do the same::

    import aligncurate

    aligncurate.score(["pairs/{00000..00099}.tar"], "scored", model="tiny")
    aligncurate.bucket("scored", "levelled", levels=8)
    frame = aligncurate.open_dataset("levelled").scan()  # a polars LazyFrame
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from aligncurate.dataset.reader import Dataset, open_dataset
    from aligncurate.sources.detect import open_source
    from aligncurate.sources.options import SourceOptions
    from aligncurate.verbs.bucket import bucket
    from aligncurate.verbs.export.export import export
    from aligncurate.verbs.filter.filter import filter
    from aligncurate.verbs.finish import finish
    from aligncurate.verbs.ingest import ingest
    from aligncurate.verbs.inspect.inspect import inspect
    from aligncurate.verbs.join.join import join
    from aligncurate.verbs.merge import merge
    from aligncurate.verbs.score import score
    from aligncurate.verbs.verify.verify import verify

# Importing torch and open_clip takes seconds; `import aligncurate` must not, so names load on first use.
_HOMES = {
    "Dataset": "dataset.reader",
    "SourceOptions": "sources.options",
    "bucket": "verbs.bucket",
    "export": "verbs.export.export",
    "filter": "verbs.filter.filter",
    "finish": "verbs.finish",
    "ingest": "verbs.ingest",
    "inspect": "verbs.inspect.inspect",
    "join": "verbs.join.join",
    "merge": "verbs.merge",
    "open_dataset": "dataset.reader",
    "open_source": "sources.detect",
    "score": "verbs.score",
    "verify": "verbs.verify.verify",
}

__all__ = [
    "Dataset",
    "SourceOptions",
    "bucket",
    "export",
    "filter",
    "finish",
    "ingest",
    "inspect",
    "join",
    "merge",
    "open_dataset",
    "open_source",
    "score",
    "verify",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'aligncurate' has no attribute {name!r}")
    return getattr(import_module(f"aligncurate.{_HOMES[name]}"), name)
