"""Detects what kind of data a URI names, and opens it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aligncurate.dataset.manifest import MANIFEST
from aligncurate.dataset.reader import Dataset
from aligncurate.errors import UserError
from aligncurate.images.formats import EXTENSIONS
from aligncurate.io import storage
from aligncurate.sources.annotations import AnnotationRows
from aligncurate.sources.base import Source, Sources
from aligncurate.sources.curated import CuratedSource
from aligncurate.sources.fields import Naming
from aligncurate.sources.options import FORMATS, SourceOptions
from aligncurate.sources.parquet import ParquetRows
from aligncurate.sources.rows import RowFile, RowSource
from aligncurate.sources.table import TableRows
from aligncurate.sources.webdataset import WebDatasetSource

_ENDINGS = {
    "webdataset": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"),
    "parquet": (".parquet", ".pq"),
    "annotations": (".json", ".jsonl", ".ndjson"),
    "table": (".csv", ".tsv"),
}
# In a folder with several kinds of files the first of these wins: tables beside tars usually describe the tars.


def open_source(uris: str | Sequence[str], options: SourceOptions | None = None) -> Source:
    """Open image-text data: tars, Parquet, JSON, JSONL, CSV or TSV files, folders of these, or our datasets.

    Args:
        uris: paths or fsspec URIs; braces and wildcards expand.

    Raises UserError if a file is missing or its format is unknown.
    """
    options = options or SourceOptions()
    groups: list[tuple[str, list[str]]] = []
    notices: list[str] = []
    for uri in [uris] if isinstance(uris, str) else uris:
        for kind, files in _expand(uri, options.format, notices):
            if groups and groups[-1][0] == kind and kind != "dataset":
                groups[-1][1].extend(files)
            else:
                groups.append((kind, files))
    if not groups:
        raise UserError("no input given; name at least one file or folder.")
    sources = [_open(kind, files, options) for kind, files in groups]
    source = sources[0] if len(sources) == 1 else Sources(sources)
    source.notices = [*notices, *source.notices]
    return source


def _expand(uri: str, format: str | None, notices: list[str]) -> list[tuple[str, list[str]]]:
    """(format, files) of everything that `uri` stands for."""
    groups = []
    for path in storage.expand(uri):
        if storage.is_folder(path):
            groups.append(_folder(path, format, notices))
        else:
            groups.append((format or _kind_of(path), [path]))
    return groups


def _folder(path: str, format: str | None, notices: list[str]) -> tuple[str, list[str]]:
    files = storage.list_files(path)
    names = {storage.basename(f) for f in files}
    if format in (None, "dataset") and MANIFEST in names:
        if storage.is_remote(path):
            raise UserError(f"{path}: a dataset can only be read from a local folder; copy it first.")
        return "dataset", [path]
    by_kind = {kind: [f for f in files if f.lower().endswith(ends)] for kind, ends in _ENDINGS.items()}
    by_kind["annotations"] = [f for f in by_kind["annotations"] if not _is_sidecar(storage.basename(f))]
    chosen = format or next((kind for kind, members in by_kind.items() if members), None)
    if chosen is None or not by_kind.get(chosen):
        raise UserError(f"{path}: {_why_nothing(names, format, storage.has_folders(path))}")
    stems = {storage.basename(f).partition(".")[0] for f in by_kind[chosen]}
    ignored = [
        storage.basename(f)
        for kind, members in by_kind.items()
        if kind != chosen
        for f in members
        if storage.basename(f).partition(".")[0] not in stems
    ]
    if ignored:
        rest = f" and {len(ignored) - 3} more" if len(ignored) > 3 else ""
        notices.append(
            f"{path}: reading the {chosen} files in it ({len(by_kind[chosen])}) and ignoring "
            f"{', '.join(ignored[:3])}{rest}; to read one of those, give it by name."
        )
    return chosen, by_kind[chosen]


def _is_sidecar(name: str) -> bool:
    """Whether img2dataset or our own export wrote this JSON beside the data."""
    return name.endswith("_stats.json") or name in ("export.json", "failed.jsonl")


def _why_nothing(names: set[str], format: str | None, has_folders: bool) -> str:
    if format is not None:
        return f"the folder has no files for --format {format}."
    if not names and has_folders:
        return "the folder contains only folders; give those instead."
    if not names:
        return "the folder is empty; give tars, Parquet, JSON, JSONL, CSV or TSV files."
    if any(n.rpartition(".")[2].lower() in EXTENSIONS for n in names):
        return "the folder contains only images; give a table or JSON file with their names and captions."
    return "the folder has no tars, Parquet, JSON, JSONL, CSV or TSV files."


def _kind_of(path: str) -> str:
    for kind, endings in _ENDINGS.items():
        if path.lower().endswith(endings):
            return kind
    raise UserError(f"{path}: unknown file type; set the format with --format ({', '.join(FORMATS)}).")


def _open(kind: str, files: list[str], options: SourceOptions) -> Source:
    if kind == "dataset":
        return CuratedSource(Dataset(files[0]))
    if kind == "webdataset":
        return WebDatasetSource(files, options.caption_column)
    root = options.image_root
    if root is not None:
        root = storage.absolute(root)
        if not storage.exists(root):
            raise UserError(f"--image-root {root}: no such folder.")
        if not storage.is_folder(root) and not root.endswith(".tar"):
            raise UserError(f"--image-root {root}: this is neither a folder nor a tar.")
    naming = Naming(options.caption_column, options.image_column, root)
    per_shard = options.rows_per_shard
    make: dict[str, Callable[[str], RowFile]] = {
        "parquet": lambda uri: ParquetRows(uri, naming),
        "annotations": lambda uri: AnnotationRows(uri, naming, per_shard),
        "table": lambda uri: TableRows(uri, naming),
    }
    return RowSource(kind, [make[kind](uri) for uri in files], per_shard, options.captions)
