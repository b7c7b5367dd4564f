"""Detects what kind of data a URI names, by its content, and opens it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from aligncurate.dataset.reader import Dataset
from aligncurate.errors import NoPairsError, UserError
from aligncurate.io import storage
from aligncurate.io.content import JSON, TEXT, Content, what_is
from aligncurate.io.files import check_name
from aligncurate.sources import folders, notes
from aligncurate.sources.annotations import AnnotationRows
from aligncurate.sources.base import Source, Sources
from aligncurate.sources.curated import CuratedSource
from aligncurate.sources.fields import Naming
from aligncurate.sources.folders import Folder
from aligncurate.sources.image_folder import ImageFolderSource
from aligncurate.sources.options import FORMATS, SourceOptions
from aligncurate.sources.parquet import ParquetRows
from aligncurate.sources.rows import RowFile, RowSource
from aligncurate.sources.samples import Endings
from aligncurate.sources.table import TableRows
from aligncurate.sources.webdataset import WebDatasetSource

_TARS = WebDatasetSource.kind
_REMOTE_LOOKS = 16  # remote files whose content is looked at before the run; each takes a request


def open_source(uris: str | Sequence[str], options: SourceOptions | None = None) -> Source:
    """Open image-text data: tars, Parquet, JSON, JSONL, CSV or TSV files, folders of these, of images, or our datasets.

    A file is known by its content. One that holds no pairs is skipped with a notice if a folder or wildcard names it.

    Args:
        uris: paths or fsspec URIs; braces and wildcards expand.

    Raises UserError if a file is missing, cannot be read or holds no pairs, or if nothing is left to read.
    """
    inputs = _Inputs(options or SourceOptions())
    for uri in [uris] if isinstance(uris, str) else uris:
        inputs.add(uri)
    return inputs.source()


class _Inputs:
    """Collects what is to be read, in order; neighbours of one kind become one source."""

    def __init__(self, options: SourceOptions) -> None:
        self._options = options
        self._endings = Endings(options.image_column, options.caption_column)
        self._groups: list[tuple[str, list[Any]]] = []
        self._seen: set[object] = set()
        self._twice: list[str] = []
        self._misnamed: dict[str, Content] = {}
        self._skipped: list[str] = []  # sentences without their full stops
        self._notices: list[str] = []
        self._looks = 0

    def add(self, uri: str) -> None:
        """Add everything that `uri` stands for."""
        is_wildcard = ("*" in uri or "?" in uri) and not storage.exists(storage.absolute(uri))
        paths = storage.expand(uri)
        many = len(paths) > _REMOTE_LOOKS
        is_folder = {
            path: not (many and storage.is_remote(path) and folders.kind_by_name(path)) and storage.is_folder(path)
            for path in paths
        }
        files = [path for path in paths if not is_folder[path]]
        kinds = self._kinds(files, self._options.format, skip=is_wildcard)
        for path in paths:
            if is_folder[path]:
                self._add_folder(path)
            elif kind := kinds[path]:
                self._take(kind, path, skip=is_wildcard)

    def source(self) -> Source:
        """The source of all that was added. Raises UserError if that is nothing."""
        if not self._groups:
            first = next(iter(self._skipped), "no input given; name at least one file or folder")
            others = len(self._skipped) - 1
            raise UserError(f"{first}{f'; nor can {others:,} more be read' if others > 0 else ''}.")
        sources = [self._open(kind, items) for kind, items in self._groups]
        source = sources[0] if len(sources) == 1 else Sources(sources)
        source.notices = [*self._notes(), *source.notices]
        return source

    # --- files -------------------------------------------------------------------------------------------------------

    def _kinds(self, files: Sequence[str], format: str | None, *, skip: bool) -> dict[str, str | None]:
        """The kind of each file, see `_kind`. Among tars, a file that should be one is a shard, which will fail."""
        before = list(self._skipped)
        kinds = {file: self._kind(file, format, skip=skip) for file in files}
        if _TARS in kinds.values():
            no_tars = {file for file in files if kinds[file] is None and folders.kind_by_name(file) == _TARS}
            kinds |= dict.fromkeys(no_tars, _TARS)
            beginnings = tuple(f"{file}: " for file in no_tars)
            skipped = self._skipped[len(before) :]
            self._skipped = [*before, *(error for error in skipped if not error.startswith(beginnings))]
        return kinds

    def _kind(self, file: str, format: str | None, *, skip: bool) -> str | None:
        """The kind of a file; None if it cannot be read and is skipped. Raises UserError if it must not be skipped."""
        check_name(file)  # it could not be found again by the name that a dataset keeps
        named = format or folders.kind_by_name(file)
        content = self._look(file)
        kind = named if content is None else folders.kind_by_content(named, content)
        if format is not None and (kind == format or (content in (JSON, TEXT) and format in ("annotations", "table"))):
            return format
        if kind is not None and format is None:
            if kind != named and content is not None:
                self._misnamed[file] = content
            return kind
        if content is None or (named is None and content.kind in ("text", "damaged")):
            error = f"unknown file type; set the format with --format ({', '.join(FORMATS)})"
        else:
            error = content.instead_of(folders.EXPECTED.get(named or "", "image-text data"))
            if format is not None and content.kind is not None:
                error = f"{error.partition(';')[0]}; leave out --format {format}"
        if not skip:
            raise UserError(f"{file}: {error}.")
        self._skipped.append(f"{file}: {error}")
        return None

    def _look(self, file: str) -> Content | None:
        """What a file is; None if that shows when it is read: it cannot be, or is one of many remote ones."""
        self._looks += storage.is_remote(file)
        if storage.is_remote(file) and self._looks > _REMOTE_LOOKS:
            return None
        try:
            return what_is(file)
        except OSError:
            return None

    def _take(self, kind: str, uri: str, *, skip: bool) -> bool:
        """Read a file or dataset; False if it holds no pairs and is skipped. Raises UserError if it must not be."""
        if not self._is_new(uri):
            return True
        item: str | RowFile = uri
        if kind in self._row_files:
            try:
                item = self._row_files[kind](uri)
            except UserError as error:
                fault = self._as_misnamed(uri) or error
                if not skip or not isinstance(fault, NoPairsError):
                    raise fault from None
                self._skipped.append(str(fault).rstrip("."))
                return False
            if skip and item.only_urls and storage.is_folder(beside := uri.rpartition(".")[0]):
                self._skipped.append(f"{uri}: it has no images, but says where those in {beside} are from")
                return False
        if kind != "dataset" and self._groups and self._groups[-1][0] == kind:
            self._groups[-1][1].append(item)
        else:
            self._groups.append((kind, [item]))
        return True

    def _as_misnamed(self, uri: str) -> NoPairsError | None:
        """What is wrong with a file of another kind than its name says, which holds no pairs of that kind either."""
        content = self._misnamed.pop(uri, None)
        what = folders.EXPECTED.get(folders.kind_by_name(uri) or "", "image-text data")
        return None if content is None else NoPairsError(f"{uri}: {content.instead_of(what)}.")

    def _is_new(self, uri: str) -> bool:
        """Whether a file or folder has not been given before, by this or another name."""
        if storage.is_remote(uri):
            identity: object = uri
        else:
            stat = os.stat(uri)
            identity = (stat.st_dev, stat.st_ino)
        if identity in self._seen:
            self._twice.append(uri)
            return False
        self._seen.add(identity)
        return True

    # --- folders -----------------------------------------------------------------------------------------------------

    def _add_folder(self, path: str) -> None:
        format = self._options.format
        for dataset in (path, storage.parent(path)) if storage.basename(path) == "data" else (path,):
            if format in (None, "dataset") and folders.is_dataset(dataset):
                self._take("dataset", dataset, skip=False)
                return
        skipped = len(self._skipped)
        top = Folder.scan(path, self._endings, deep=False)
        if self._add_data(path, top.data):
            self._notices += notes.left_out(path, top.others, folders.with_data(path, self._endings))
            return
        tree = Folder.scan(path, self._endings, deep=True)
        below = {kind: [file for file in files if file not in set(top.data[kind])] for kind, files in tree.data.items()}
        if not top.pairs and self._add_data(path, below):
            return
        if (tree.pairs or (tree.images and format == "imagefolder")) and format in (None, "imagefolder"):
            images = {folder: files for folder, files in tree.images.items() if self._is_new(folder)}
            if images:
                self._groups.append(("imagefolder", [path, images]))
            # img2dataset's tables beside the folders were tried as data; they are read with the images.
            tables = tuple(f"{folder}.parquet: " for folder in images)
            self._skipped = [error for error in self._skipped if not error.startswith(tables)]
        elif len(self._skipped) == skipped or folders.odd_content(tree):
            raise UserError(f"{path}: {folders.describe_nothing(tree, format)}.")

    def _add_data(self, path: str, data: Mapping[str, Sequence[str]]) -> bool:
        """Add the data files of a folder: those of the first kind that has any with pairs. False if there are none."""
        format = self._options.format
        by_kind: dict[str, list[str]] = {kind: [] for kind in folders.ENDINGS}
        for named, files in data.items():
            for file, kind in self._kinds(files if format in (None, named) else (), format, skip=True).items():
                if kind is not None:
                    by_kind[kind].append(file)
        chosen: str | None = None
        ignored: list[str] = []
        stems: set[str] = set()
        for kind, files in by_kind.items():
            if chosen is not None:
                ignored += [file for file in files if _stem(file) not in stems]
            elif sum(self._take(kind, file, skip=True) for file in files):
                chosen, stems = kind, {_stem(file) for file in files}
        if ignored:
            names = notes.some([storage.basename(file) for file in ignored])
            self._notices.append(
                f"{path}: reading the {chosen} files in it ({len(by_kind[chosen or ''])}) and ignoring {names}; "
                "to read one of those, give it by name."
            )
        return chosen is not None

    # --- sources -----------------------------------------------------------------------------------------------------

    @cached_property
    def _row_files(self) -> dict[str, Callable[[str], RowFile]]:
        """How a file of rows is opened, by its kind. Raises UserError for an --image-root that cannot be used."""
        options, root = self._options, self._options.image_root
        if root is not None:
            root = storage.absolute(root)
            if not storage.exists(root):
                raise UserError(f"--image-root {root}: no such folder.")
            if not storage.is_folder(root) and not root.endswith(".tar"):
                raise UserError(f"--image-root {root}: this is neither a folder nor a tar.")
        naming = Naming(options.caption_column, options.image_column, root)
        return {
            "parquet": lambda uri: ParquetRows(uri, naming),
            "annotations": lambda uri: AnnotationRows(uri, naming, options.rows_per_shard, options.captions),
            "table": lambda uri: TableRows(uri, naming, options),
        }

    def _open(self, kind: str, items: list[Any]) -> Source:
        options = self._options
        if kind == "dataset":
            return CuratedSource(Dataset(items[0]))
        if kind == _TARS:
            return WebDatasetSource(items, self._endings, options.captions)
        if kind == "imagefolder":
            root, images = items
            return ImageFolderSource(root, images, options.rows_per_shard, self._endings, options.captions)
        return RowSource(kind, items, options.rows_per_shard, options.captions)

    def _notes(self) -> list[str]:
        files: dict[str, int | None] = {}
        for kind, items in self._groups:
            if kind == "imagefolder":
                files |= dict.fromkeys(items[1])
            else:
                files |= {item.uri: item.rows for item in items} if kind in self._row_files else dict.fromkeys(items)
        notices = list(self._notices)
        if len(files) > 1:
            notices.append(notes.files_read(files))
            notices += notes.splits_mixed(files)
        misnamed = [
            f"{storage.basename(file)} is {content.name}" for file, content in self._misnamed.items() if file in files
        ]
        notices += [f"read by content, not by name: {notes.some(misnamed)}."] if misnamed else []
        notices += [f"given more than once, read once: {notes.some(self._twice)}."] if self._twice else []
        notices += notes.skipped(self._skipped)
        return notices


def _stem(file: str) -> str:
    return storage.basename(file).partition(".")[0]
