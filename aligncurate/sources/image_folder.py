"""Folders of images with a text beside each: `0.jpg` and `0.txt`, `.caption` or `.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import islice
from typing import Any

from aligncurate.dataset.record import Status
from aligncurate.io import storage
from aligncurate.io.files import readable
from aligncurate.sources.base import Shard, cut, merge_extras
from aligncurate.sources.img2dataset import extras_beside, not_downloaded, rows_beside
from aligncurate.sources.options import Several
from aligncurate.sources.samples import (
    MAX_TEXT_BYTES,
    Contents,
    Endings,
    Image,
    Sample,
    SampleSource,
)

_PEEK, _PEEK_REMOTE = 200, 20  # samples that decide the types of the extra columns
_NO_CAPTIONS = frozenset(
    {"readme", "license", "licence", "notice", "classes", "labels", "requirements", "train", "val", "test"}
)  # stems of texts that need no image


def group_by_stem(files: Sequence[str], endings: Endings) -> dict[str, dict[str, str]]:
    """The images and texts among a folder's files: `{stem: {ending: file}}`, in the order of the files."""
    groups: dict[str, dict[str, str]] = {}
    for file in files:
        stem, dot, ending = storage.basename(file).rpartition(".")
        ending = ending.lower()
        if dot and stem and (endings.is_image(ending) or endings.is_text(ending)):
            groups.setdefault(stem, {})[ending] = file
    return groups


def has_image(group: Mapping[str, str], endings: Endings) -> bool:
    return any(endings.is_image(ending) for ending in group)


def is_pair(group: Mapping[str, str], endings: Endings) -> bool:
    """Whether the files with one stem are an image and a text."""
    return has_image(group, endings) and not all(endings.is_image(ending) for ending in group)


class ImageFolderSource(SampleSource):
    """The images of folders, each with the text of the same name; every folder is cut into shards.

    A text without an image is a row too, except for a `README.txt` and the like.

    Args:
        root: keys are paths relative to this folder, without their endings.
        folders: the folders, and the files in each.
        rows_per_shard: samples in a shard.
        endings: the endings of images and captions, where they are not the usual ones.
        captions: what becomes of several captions of one image.
    """

    kind = "imagefolder"

    def __init__(
        self,
        root: str,
        folders: Mapping[str, Sequence[str]],
        rows_per_shard: int,
        endings: Endings,
        captions: Several = "all",
    ) -> None:
        super().__init__(endings, captions)
        self._root = root.rstrip("/")
        self._folders: dict[str, list[dict[str, str]]] = {}
        self.shards: list[Shard] = []
        for folder, files in folders.items():
            groups = group_by_stem(files, endings)
            kept = [group for stem, group in groups.items() if self._is_row(stem, group)]
            if kept:
                self._folders[folder] = kept
                self.shards += cut(folder, len(kept), rows_per_shard, len(self.shards))
        groups_of_all = (group for kept in self._folders.values() for group in kept)
        first = islice(groups_of_all, _PEEK_REMOTE if storage.is_remote(root) else _PEEK)
        columns = self.look(self._sample(group, "texts") for group in first)
        self.extras = merge_extras([columns, extras_beside(next(iter(self._folders), ""))])
        self.notices = not_downloaded(list(self._folders))

    def _is_row(self, stem: str, group: Mapping[str, str]) -> bool:
        if has_image(group, self._endings):
            return True
        return group.keys() != {"json"} and stem.lower() not in _NO_CAPTIONS

    def describe(self) -> list[dict[str, Any]]:
        files = []
        for folder, groups in self._folders.items():
            found = storage.pins([file for group in groups for file in group.values()])
            size = sum((pin or {}).get("bytes") or 0 for pin in found.values())
            digest = sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
            files.append({"uri": folder, "bytes": size, "pins_sha256": digest})
        return [{"kind": self.kind, "root": self._root, "files": files}]

    def samples(self, shard: Shard, contents: Contents) -> Iterator[tuple[Sample, Mapping[str, Any]]]:
        rows = {} if contents == "nothing" else rows_beside(shard.uri)
        for group in self._folders[shard.uri][shard.start : shard.stop]:
            sample = self._sample(group, contents)
            yield sample, rows.get(storage.basename(sample.key), {})

    def _sample(self, group: Mapping[str, str], contents: Contents) -> Sample:
        file = next(iter(group.values()))
        sample = Sample(readable(file.removeprefix(f"{self._root}/").rpartition(".")[0]))
        for ending, file in group.items():
            sample.files[ending] = readable(storage.basename(file))
            if readable(file) != file:  # it could not be found again by the name that the dataset keeps
                sample.fail(Status.READ_ERROR, f"the name {readable(file)} is not UTF-8; rename the file or folder")
            if not storage.is_remote(file) and storage.leads_out(file, [self._root or "/"]):
                name, target = readable(storage.basename(file)), readable(os.path.realpath(file))
                sample.fail(
                    Status.UNSAFE_PATH,
                    f"{name} is a link to {target}, outside of the folder {readable(self._root)}; copy the file, "
                    "or give a folder above both",
                )
                continue
            if self._endings.is_image(ending):
                sample.images[ending] = Image(file, partial(storage.read, file, storage.MAX_IMAGE_BYTES))
                continue
            if contents == "nothing":
                continue
            with storage.open_file(file) as opened:
                data = opened.read(MAX_TEXT_BYTES + 1)
            if len(data) > MAX_TEXT_BYTES:
                sample.fail(Status.TOO_LARGE, f"{storage.basename(file)} has more than {MAX_TEXT_BYTES:,} bytes")
            else:
                sample.texts[ending] = data
        return sample
