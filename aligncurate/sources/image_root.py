"""Finds images by name, for tables and annotation files: files in folders, or members of the tars in them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from errno import ENOENT
from functools import partial
from itertools import islice
from threading import Lock
from typing import Any, Self

from aligncurate.dataset.record import Pair, Status
from aligncurate.errors import ShardError
from aligncurate.images.formats import EXTENSIONS
from aligncurate.io import storage
from aligncurate.io.tar import is_readable, tar_members
from aligncurate.sources.image_names import (
    ENDINGS,
    ending_of,
    files_of,
    first_existing,
    paths_in,
    plain,
    shortened,
    similar_name,
    spellings,
    without_scheme,
)

# Where images usually are, relative to the file that names them.
_FOLDERS = ("images", "imgs", "img", "image", "train2017", "val2017", "train2014", "val2014", "../images",
           "../train2017", "../val2017", "../train2014", "../val2014")  # fmt: skip
_MOST_FOLDERS = 64  # beside a file, in which its images are looked for
_MOST_MEMBERS = 5_000_000  # of tars; an index of more would not fit in memory

Member = tuple[str, int, int]  # tar, offset, length


class ImageRoot:
    """The folders that image names are relative to, the first being the first choice.

    A name is found in every spelling that means the same file: with slashes of both kinds, `./`, `%20` or `file://`, in
    either Unicode form, and without its ending if only one file has that name. An image that is not there as a file is
    looked up in the folders' tars.

    Args:
        folders: where images are looked for.
        elsewhere: a folder that has some of them, for messages.
        given: the user named the folder, and so vouches for its links; otherwise links out of it are not followed.

    Attributes:
        unasked: how many images were taken from each tar that the user did not name.
    """

    def __init__(self, folders: Sequence[str], elsewhere: str | None = None, *, given: bool = False) -> None:
        self.folders, self.elsewhere, self._given = folders, elsewhere, given
        self.unasked: Counter[str] = Counter()
        self._members: dict[str, Member] = {}
        self._unread: Iterator[None] | None = None
        self._faults: list[str] = []
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        # A worker process looks through the tars itself, if it must.
        return {**self.__dict__, "_members": {}, "_unread": None, "_faults": [], "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    @classmethod
    def near(cls, base: str, names: Sequence[str]) -> Self:
        """The folders in or near `base` that have images with these `names`, those with the most first, then `base`."""
        names = [name for name in dict.fromkeys(map(without_scheme, names)) if "://" not in name and name[:1] != "/"]
        if not names:
            return cls([base])
        if storage.is_remote(base):
            names = names[:16]
        best = _having(names, [base, *(storage.join(base, folder) for folder in _FOLDERS)])
        beside = _having(names, _folders_in(base)) if not best else []
        return cls(list(dict.fromkeys([*map(storage.absolute, best), base])), beside[0] if beside else None)

    def attach(self, pair: Pair, name: str) -> None:
        """Point `pair` at the image called `name`, or set the status that says why it cannot be used.

        Raises OSError if a folder or tar cannot be read now.
        """
        local = without_scheme(name)
        if "://" in local or local[:5].lower() == "data:":
            # Not kept as image_path, so that nothing that reads the dataset later follows it.
            what = "is a URL; download it first, for example with img2dataset"
            what = what if "://" in local else "cannot be decoded"
            pair.fail(Status.MISSING_IMAGE, f"{shortened(local)} {what}")
            return
        paths = list(dict.fromkeys(path for folder in self.folders for path in paths_in(folder, local)))
        if not paths:
            pair.image_path = name
            pair.fail(Status.UNSAFE_PATH, self._outside(local))
            return
        pair.image_path = paths[0]
        if storage.is_remote(paths[0]):
            pair.load = partial(_read_first, pair, paths)
            return
        files = files_of(paths)
        if len(files) == 1 and not self._given and storage.leads_out(files[0], self.folders):
            pair.fail(
                Status.UNSAFE_PATH,
                f"{shortened(files[0])} is a link to {os.path.realpath(files[0])}, outside of the image folder; "
                f"pass --image-root {self.folders[0]} to follow its links",
            )
        elif len(files) == 1:
            pair.image_path, pair.load = files[0], partial(storage.read, files[0], storage.MAX_IMAGE_BYTES)
        elif member := None if files else self._member(local):
            tar, offset, length = member
            with self._lock:
                self.unasked[tar] += not self._given
            # `source` is now the tar, so the row number of the table no longer applies.
            pair.source, pair.row, pair.image_path = tar, None, name
            pair.image_offset, pair.image_length = offset, length
            pair.load = partial(storage.read_range, tar, offset, length)
        else:
            hint = f"there are {' and '.join(map(storage.basename, files))}" if files else self._hint(local, paths)
            pair.fail(Status.MISSING_IMAGE, f"there is no image {shortened(paths[0])}{hint and '; '}{hint}")

    def _outside(self, name: str) -> str:
        """Why a name is not in the folders."""
        if not name.startswith("/"):
            return f"the image path {name} contains '..'; use --image-root and paths relative to it"
        if inside := self._trailing(name):
            return f"the image path {name} is outside {self.folders[0]}, where there is {inside}; use relative paths"
        return (
            f"the image path {name} is outside {self.folders[0]}; set --image-root to a folder above it, such as "
            f"{storage.parent(name)}"
        )

    def _hint(self, name: str, paths: Sequence[str]) -> str:
        """Where an image that was not found may be; empty if nothing is known."""
        for path in paths:
            if os.path.islink(path):
                return f"it is a link to {os.readlink(path)}, which does not exist"
            if near := similar_name(path):
                return f"there is {near}"
        if self.elsewhere and first_existing(list(paths_in(self.elsewhere, name))):
            return f"there is one in {self.elsewhere}, so pass --image-root {self.elsewhere}"
        if first_existing([os.path.abspath(name)]):
            return f"there is one relative to the working folder, so pass --image-root {os.getcwd()}"
        if inside := self._trailing(name):
            return f"there is {inside}"
        return "; ".join(self._faults[:3])

    def _trailing(self, name: str) -> str | None:
        """The file in the folders, or member of their tars, whose path is the end of `name`, the longest."""
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        for start in range(1, len(parts)):
            paths = [p for folder in self.folders for p in paths_in(folder, "/".join(parts[start:]))]
            if paths and not storage.is_remote(paths[0]) and (files := first_existing(paths)):
                return files[0]
            if (end := plain("/".join(parts[start:]))) in self._members:
                return f"{end} in {self._members[end][0]}"
        return None

    def _member(self, name: str) -> Member | None:
        """The member of the folders' tars with this name; tars are read only as far as needed, once."""
        names = [plain(spelling) for spelling in spellings(name)]
        if ending_of(names[0]) not in EXTENSIONS:
            names += [f"{names[0]}.{ending}" for ending in ENDINGS]
        with self._lock:
            self._unread = self._unread or self._read_tars()
            try:
                while not (found := next((self._members[n] for n in names if n in self._members), None)):
                    next(self._unread)
            except StopIteration:
                return None
            except OSError:
                self._unread = None  # begin again next time
                raise
            return found

    def _read_tars(self) -> Iterator[None]:
        """Add the tars' images to `_members`, one after another."""
        for uri in [file for folder in self.folders for file in _tars(folder)]:
            try:
                end = storage.size(uri)
                with storage.open_file(uri) as file:
                    for member in tar_members(file, uri):
                        if isinstance(member, str):
                            raise ShardError(f"{uri}: {member}")
                        if is_readable(member, end) and member.name.rpartition(".")[2].lower() in EXTENSIONS:
                            if len(self._members) == _MOST_MEMBERS:
                                self._faults.append(f"only {_MOST_MEMBERS:,} images of the tars were looked through")
                                return
                            place = (uri, member.offset, member.size)
                            if self._members.setdefault(plain(member.name), place) is place:
                                yield
            except (ShardError, PermissionError) as error:  # what comes before the damage is used
                self._faults.append(f"{str(error).rstrip('.')}, so it may be lost in there")


def _having(names: Sequence[str], folders: Sequence[str]) -> list[str]:
    """The folders that have some of the named images, those with the most first."""
    counts: dict[str, int] = {}
    for folder in folders:
        remote = storage.is_remote(folder)
        if remote or os.path.isdir(folder):
            found = (1 for name in names if files_of(list(paths_in(folder, name))))
            counts[folder] = sum(islice(found, 1 if remote else None))
        if remote and counts[folder]:  # each look costs a request
            break
    return sorted((folder for folder, count in counts.items() if count), key=lambda folder: -counts[folder])


def _folders_in(folder: str) -> list[str]:
    """Some of the folders in a local folder."""
    found: list[str] = []
    if not storage.is_remote(folder):
        with suppress(OSError), os.scandir(folder) as entries:
            found += islice((entry.path for entry in entries if entry.is_dir()), _MOST_FOLDERS)
    return sorted(found)


def _read_first(pair: Pair, paths: Sequence[str]) -> bytes:
    """The bytes of the first of some remote files that exists, which becomes the pair's image."""
    for path in paths:
        with suppress(FileNotFoundError):
            data = storage.read(path, storage.MAX_IMAGE_BYTES)
            pair.image_path = path
            return data
    raise FileNotFoundError(ENOENT, "there is no such file", paths[0])


def _tars(folder: str) -> list[str]:
    files = storage.list_files(folder) if storage.is_folder(folder) else [folder]
    return [file for file in files if file.endswith(".tar")]
