"""Image-text data somebody already has, in any of the forms the field uses: `open_source` finds out which."""

from aligncurate.sources.base import Shard, Source
from aligncurate.sources.detect import FORMATS, SourceOptions, open_source

__all__ = ["FORMATS", "Shard", "Source", "SourceOptions", "open_source"]
