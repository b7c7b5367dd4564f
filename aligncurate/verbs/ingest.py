"""The verb `ingest`: from sources to a dataset without scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aligncurate.io.paths import AnyPath
from aligncurate.progress import notice
from aligncurate.scoring.options import IngestOptions, ScoreOptions
from aligncurate.settings import lists_settings, make, recorded
from aligncurate.sources.curated import CuratedSource
from aligncurate.sources.options import SourceOptions
from aligncurate.verbs.from_sources import ScoreResult, make_dataset, open_sources

_WINDOW = 256  # pairs that are read ahead of their writing


@lists_settings(IngestOptions)
def ingest(
    sources: str | Path | Sequence[str | Path],
    out: str | AnyPath,
    *,
    source: SourceOptions | None = None,
    quiet: bool = False,
    **settings: Any,
) -> ScoreResult:
    """Make a dataset without scores: images are measured and hashed, and no model is loaded.

    Args:
        sources: what to read; see `open_source`.
        out: folder of the new dataset. If an interrupted run left it, the run is resumed.
        source: how to read the sources.
        quiet: no progress and notices.
        settings: fields of `aligncurate.scoring.options.IngestOptions`, described there.

    Raises UserError for options and inputs that cannot be used. Rows with faults get a status instead.
    """
    options = make(IngestOptions, settings)
    source = source or SourceOptions()
    opened = open_sources(sources, source)
    inputs = opened.describe()
    if len(inputs) > 1 and all(line["kind"] == CuratedSource.kind for line in inputs):
        notice("all inputs are datasets; `aligncurate merge` joins them without reading images", quiet=quiet)
    given = {**vars(options), "workers": options.worker_count}
    scoring = ScoreOptions(**given, batch_size=_WINDOW, score_text="all")
    return make_dataset("ingest", opened, out, {}, scoring, recorded(options), source, quiet=quiet)
