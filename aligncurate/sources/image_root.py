"""Finds images by name, for tables and annotation files: files in a folder, or members of the tars in it."""

from __future__ import annotations

from functools import partial
from pathlib import PurePosixPath
from threading import Lock

from aligncurate.dataset.record import Pair, Status
from aligncurate.errors import ShardError, UserError
from aligncurate.images.formats import EXTENSIONS
from aligncurate.io import storage
from aligncurate.io.tar import tar_members


class ImageRoot:
    """The folder that image names are relative to.

    An image that is not there as a file is looked up in the folder's tars.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._members: dict[str, tuple[str, int, int]] | None = None
        self._lock = Lock()

    def attach(self, pair: Pair, name: str) -> None:
        """Point `pair` at the image called `name`, or set the status that says why it cannot be used.

        Raises UserError if a tar in the folder is damaged.
        """
        path = self._resolve(pair, name)
        if path is None:
            return
        if not storage.is_remote(path) and not _exists(path):
            member = self._find_member(name)
            if member is not None:
                tar, offset, length = member
                # `source` is now the tar, so the row number of the table no longer applies.
                pair.source, pair.row, pair.image_path = tar, None, name
                pair.image_offset, pair.image_length = offset, length
                pair.load = partial(storage.read_range, tar, offset, length)
                return
        pair.image_path = path
        pair.load = partial(storage.read, path)

    def _resolve(self, pair: Pair, name: str) -> str | None:
        if "://" in name:
            # Not kept as image_path, so that nothing that reads the dataset later follows it.
            pair.fail(Status.MISSING_IMAGE, f"{name} is a URL; download it first, for example with img2dataset")
            return None
        if ".." in PurePosixPath(name).parts:
            pair.image_path = name
            pair.fail(
                Status.UNSAFE_PATH,
                f"the image path {name} contains '..'; use --image-root and paths relative to it",
            )
            return None
        if name.startswith("/") and not name.startswith(self.folder.rstrip("/") + "/"):
            pair.image_path = name
            pair.fail(
                Status.UNSAFE_PATH,
                f"the image path {name} is outside {self.folder}; set --image-root to a folder above it",
            )
            return None
        return name if name.startswith("/") else storage.join(self.folder, name)

    def _find_member(self, name: str) -> tuple[str, int, int] | None:
        with self._lock:
            if self._members is None:
                self._members = self._index()
        return self._members.get(name)

    def _index(self) -> dict[str, tuple[str, int, int]]:
        members: dict[str, tuple[str, int, int]] = {}
        files = storage.list_files(self.folder) if storage.is_folder(self.folder) else [self.folder]
        for uri in files:
            if not uri.endswith(".tar"):
                continue
            try:
                with storage.open_file(uri) as file:
                    for member in tar_members(file, uri):
                        if isinstance(member, str):
                            raise UserError(f"{uri}: {member}.")
                        if member.isfile() and member.name.rpartition(".")[2].lower() in EXTENSIONS:
                            members.setdefault(member.name, (uri, member.offset_data, member.size))
            except ShardError as error:
                raise UserError(str(error)) from None
        return members


def _exists(path: str) -> bool:
    try:
        return storage.exists(path)
    except OSError:  # reading the image reports why
        return False


def find_root(base: str, names: list[str], candidates: tuple[str, ...] = ("images",)) -> str:
    """The folder that has the named images: `base`, or one of the usual folders near it.

    Args:
        base: folder of the table or annotation file.
        names: some image names from it.
        candidates: further folders to try, relative to `base`.
    """
    for folder in (base, *(storage.join(base, c) for c in candidates)):
        if any(not n.startswith("/") and "://" not in n and _exists(storage.join(folder, n)) for n in names):
            return storage.absolute(folder)
    return base
