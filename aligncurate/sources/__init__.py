"""Input formats: `open_source` detects the format of image-text data and reads it as shards of pairs."""

from __future__ import annotations

from aligncurate.sources.base import Shard, Source
from aligncurate.sources.detect import FORMATS, SourceOptions, open_source

__all__ = ["FORMATS", "Shard", "Source", "SourceOptions", "open_source"]
