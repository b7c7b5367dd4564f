"""What is in a folder: its data files by kind, its images, and the folders below it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from aligncurate.dataset.manifest import MANIFEST
from aligncurate.io import storage
from aligncurate.io.content import Content, what_is
from aligncurate.sources.image_folder import group_by_stem, has_image, is_pair
from aligncurate.sources.samples import Endings

ENDINGS = {
    "webdataset": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"),
    "parquet": (".parquet", ".pq"),
    "annotations": (".json", ".jsonl", ".ndjson"),
    "table": (".csv", ".tsv"),
}
"""Usual endings of each kind of file. In a folder with several kinds the first wins: tables often describe the tars."""

EXPECTED = {
    "webdataset": "a tar", "parquet": "a Parquet file", "annotations": "a JSON file", "table": "a table",
    "imagefolder": "a folder", "dataset": "a dataset",
}  # fmt: skip
"""What a file of each kind should be, for a sentence."""

_CONTENTS = {"tar": "webdataset", "parquet": "parquet", "json": "annotations"}
_DEEPEST = 8  # folders below the given one
_LOOKS = 20  # files without a usual ending whose content is looked at
_ENTRIES = 1_000  # of a folder beside the data, that are looked at


def kind_by_name(file: str) -> str | None:
    """The kind of a file by its ending; None if it has no usual one."""
    return next((kind for kind, endings in ENDINGS.items() if file.lower().endswith(endings)), None)


def kind_by_content(named: str | None, content: Content) -> str | None:
    """The kind of a file by its content, and by its name where the content is text or damaged; None if it has none."""
    if content.kind in _CONTENTS:
        return _CONTENTS[content.kind]
    if content.kind == "damaged" or (content.kind == "text" and named in ("annotations", "table")):
        return named
    return None


@dataclass
class Folder:
    """The files of a folder that can matter, and of the folders below it if it is read `deep`.

    Attributes:
        data: data files by kind, as their names say.
        images: the images and texts of each folder that has images.
        texts: the texts of each folder that has captions of the images in one beside it (`images`, `captions`).
        pairs: whether there is an image with a text of the same name.
        others: files of no usual ending, and no image or text.
        datasets: folders of our own datasets.
    """

    data: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in ENDINGS})
    images: dict[str, list[str]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    pairs: bool = False
    others: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)

    @classmethod
    def scan(cls, path: str, endings: Endings, *, deep: bool) -> Folder:
        """What is in the folder at `path`. Raises OSError."""
        folder = cls()
        folder._look(path, endings, _DEEPEST if deep else 0, set())
        folder._add_texts_beside(endings)
        return folder

    def _look(self, path: str, endings: Endings, depth: int, seen: set[str]) -> None:
        real = path if storage.is_remote(path) else str(Path(path).resolve())
        files = storage.list_files(path)
        if real in seen:  # a link to a folder above
            return
        if seen and storage.join(path, MANIFEST) in files and is_dataset(path):
            self.datasets.append(path)
            return
        seen.add(real)
        self.add(path, files, endings)
        for below in storage.list_folders(path) if depth else ():
            self._look(below, endings, depth - 1, seen)

    def add(self, path: str, files: list[str], endings: Endings) -> None:
        """Add the files of the folder at `path`."""
        groups = group_by_stem(files, endings)
        images = any(has_image(group, endings) for group in groups.values())
        if images:
            self.images[path] = [file for group in groups.values() for file in group.values()]
            self.pairs |= any(is_pair(group, endings) for group in groups.values())
        elif re.search("caption|text|txt|prompt", storage.basename(path).lower()):
            self.texts[path] = [file for group in groups.values() for file in group.values()]
        stems = {stem for stem, group in groups.items() if has_image(group, endings)}
        for file in files:
            name = storage.basename(file)
            kind, (stem, _, ending) = kind_by_name(file), name.rpartition(".")
            if kind == "annotations" and (_is_sidecar(name) or stem in stems):
                continue
            if kind is not None:
                self.data[kind].append(file)
            elif not endings.is_image(ending.lower()):
                self.others.append(file)

    def _add_texts_beside(self, endings: Endings) -> None:
        """Give the images in `images` the texts in `captions`, if they have none of their own."""
        for path, texts in self.texts.items():
            for images, files in self.images.items():
                groups = group_by_stem(files, endings)
                if storage.parent(images) == storage.parent(path) and not any(
                    is_pair(group, endings) for group in groups.values()
                ):
                    files += [file for file in texts if storage.basename(file).rpartition(".")[0] in groups]
                    self.pairs |= any(is_pair(group, endings) for group in group_by_stem(files, endings).values())


def _is_sidecar(name: str) -> bool:
    """Whether img2dataset or our own export wrote this JSON beside the data."""
    return name.endswith("_stats.json") or name in ("export.json", "failed.jsonl")


def is_dataset(path: str) -> bool:
    """Whether the folder at `path` is one of our own datasets, perhaps a damaged one."""
    manifest = storage.join(path, MANIFEST)
    if not storage.exists(manifest):
        return False
    with storage.open_file(manifest) as file:
        head = file.read(4096)
    parts = (storage.join(path, part) for part in ("data/part-00000.parquet", "part-00000.parquet"))
    return b'"schema_version"' in head or any(map(storage.exists, parts))


def with_data(path: str, endings: Endings) -> list[str]:
    """Names of the folders in a local folder that hold data files, which are not read with those above them."""
    if storage.is_remote(path):
        return []
    found = []
    for below in islice(storage.list_folders(path), _ENTRIES):
        some = Folder()
        some.add(below, [str(p) for p in islice(Path(below).iterdir(), _ENTRIES) if p.is_file()], endings)
        if any(some.data.values()):
            found.append(storage.basename(below))
    return found


def odd_content(folder: Folder) -> str | None:
    """What the first file of an unusual kind in a folder is, and what to do; None if there is none."""
    for file in folder.others[:_LOOKS]:
        content = what_is(file)
        if content.kind not in ("text", "damaged"):
            name = storage.basename(file)
            return f"no file in the folder has a usual ending; {name} is {content.name}: {content.advice}"
    return None


def describe_nothing(folder: Folder, format: str | None) -> str:
    """Why a folder has nothing to read, and what to do."""
    if folder.datasets:
        names = ", ".join(folder.datasets[:3])
        return f"the folder contains datasets of aligncurate; give those instead ({names})"
    if format is not None:
        return f"the folder has no files for --format {format}"
    if odd := odd_content(folder):
        return odd
    if folder.images:
        return (
            "the folder contains only images; put a text of the same name beside each (0.jpg and 0.txt), or give a "
            "table or JSON file with their names and captions"
        )
    if folder.others:
        return "the folder has no tars, Parquet, JSON, JSONL, CSV or TSV files, and no images with texts"
    return "the folder is empty; give tars, Parquet, JSON, JSONL, CSV or TSV files, or images with texts"
