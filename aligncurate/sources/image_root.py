"""Finds the images that tables and annotation files name: files below a folder, or members of tars in it."""

from functools import partial
from pathlib import PurePosixPath
from threading import Lock

from aligncurate.dataset.record import Pair, Status
from aligncurate.errors import ShardError, UserError
from aligncurate.images.formats import EXTENSIONS
from aligncurate.io import storage
from aligncurate.sources.webdataset import tar_members


class ImageRoot:
    """The folder that image names are relative to.

    Where a named file is not in the folder but the folder holds tars, the image is looked for inside them.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._members: dict[str, tuple[str, int, int]] | None = None
        self._lock = Lock()

    def attach(self, pair: Pair, name: str) -> None:
        """Point `pair` at the image called `name`, or set the status that says why not."""
        path = self._resolve(pair, name)
        if path is None:
            return
        if not storage.is_remote(path) and not _exists(path):
            member = self._find_member(name)
            if member is not None:
                tar, offset, length = member
                # The pointer leads into the tar; the table's row would mean nothing there.
                pair.source, pair.row, pair.image_path = tar, None, name
                pair.image_offset, pair.image_length = offset, length
                pair.load = partial(storage.read_range, tar, offset, length)
                return
        pair.image_path = path
        pair.load = partial(storage.read, path)

    def _resolve(self, pair: Pair, name: str) -> str | None:
        if "://" in name:
            # Not kept as image_path: whoever reads the dataset later must not follow it.
            pair.fail(Status.MISSING_IMAGE, f"{name} is an address; download it first, for example with img2dataset")
            return None
        if ".." in PurePosixPath(name).parts:
            pair.image_path = name
            pair.fail(
                Status.UNSAFE_PATH,
                f"the image path {name} contains '..'; give --image-root and paths below it",
            )
            return None
        if name.startswith("/") and not name.startswith(self.folder.rstrip("/") + "/"):
            pair.image_path = name
            pair.fail(
                Status.UNSAFE_PATH,
                f"the image path {name} lies outside {self.folder}; give --image-root, a folder above it",
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
    except OSError:  # the reading of the row's image says why
        return False


def find_root(base: str, names: list[str], candidates: tuple[str, ...] = ("images",)) -> str:
    """The folder that holds the named images: `base`, or one of the usual ones near it.

    Args:
        base: folder of the file that names the images.
        names: some of the image names.
        candidates: further folders to try, relative to `base`.
    """
    for folder in (base, *(storage.join(base, c) for c in candidates)):
        if any(not n.startswith("/") and "://" not in n and _exists(storage.join(folder, n)) for n in names):
            return storage.absolute(folder)
    return base
