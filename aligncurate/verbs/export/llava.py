"""Export as LLaVA: `annotations.json` with AlignGPT's `similarity`, and a folder of images."""

from __future__ import annotations

import json
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from aligncurate.dataset.pointers import POINTER_COLUMNS, Pointer
from aligncurate.dataset.reader import Dataset
from aligncurate.io.files import TEMPORARY, atomic_file
from aligncurate.io.paths import AnyPath, names, sizes
from aligncurate.progress import Meter
from aligncurate.verbs.export.plan import exportable_rows
from aligncurate.verbs.export.result import Exported
from aligncurate.verbs.export.sample import free_name, image_ending, safe_name

_COLUMNS = (*POINTER_COLUMNS, "image", "key", "caption", "conversations", "level")
_IMAGES = "images"
_PER_FOLDER = 10_000  # images in one folder
_AT_ONCE = 16  # images that are written together
_NAME_BYTES = 180  # of the key; most file systems allow names of 255 bytes


def write_llava(dataset: Dataset, done: Exported, progress: Meter) -> None:
    """Write the images and `annotations.json`; rows whose image cannot be read go to `done.failed`."""
    with (
        atomic_file(done.path / "annotations.json") as temporary,
        temporary.open("w", encoding="utf-8") as file,
        _Images(done) as images,
    ):
        file.write("[")
        for number, row in enumerate(exportable_rows(dataset, _COLUMNS)):
            row["key"] = f"row-{number}" if row["key"] is None else row["key"]  # of a dataset from elsewhere
            pointer = Pointer.of(row)
            try:
                name = images.path_of(row) if pointer else None
                data = pointer.read() if pointer and name is None else None
            except OSError as error:
                done.failed.append({"key": row["key"], "error": str(error)})
                progress.add(1, 0, 1)
                continue
            if data is not None:
                name = images.add(row, data)
            file.write(",\n" if done.rows else "\n")
            file.write(json.dumps(_annotation(row, name), ensure_ascii=False))
            done.rows += 1
            progress.add(1, 1, 0)
        file.write("\n]\n")
    done.files.append("annotations.json")


def images_in(folder: AnyPath) -> list[int]:
    """The number of images in the folder of an export, and the sum of their sizes."""
    found = [
        size
        for below in names(folder / _IMAGES)
        for name, size in sizes(folder / _IMAGES / below).items()
        if not name.startswith(TEMPORARY)
    ]
    return [len(found), sum(found)]


class _Images:
    """Writes the images of an export, several together, since each waits for a disk or a network.

    Leaving the `with` block waits for all of them. Those that an interrupted run has written are kept.
    """

    def __init__(self, done: Exported) -> None:
        self._done = done
        self._names: set[str] = set()
        self._paths: dict[bytes, str] = {}  # by sha256; an image that several rows share is written once
        self._there: dict[str, int] = {}  # bytes by name, in the folder that is being filled
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="images")
        self._writing: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._wait(0)

    def path_of(self, row: dict[str, Any]) -> str | None:
        """Where the image of a row is, relative to the export's folder; None if it is not written yet."""
        return self._paths.get(row["sha256"])

    def add(self, row: dict[str, Any], data: bytes) -> str:
        """Write a new image; return its path relative to the export's folder."""
        number = len(self._paths)
        folder = f"{_IMAGES}/{number // _PER_FOLDER:05d}"
        if number % _PER_FOLDER == 0:
            (self._done.path / folder).mkdir(parents=True, exist_ok=True)
            self._there = sizes(self._done.path / folder)
        stem = safe_name(row["key"]).replace("/", "_").encode()[:_NAME_BYTES].decode(errors="ignore")
        name = f"{free_name(f'{folder}/{stem}', self._names)}.{image_ending(row, data)}"
        path = self._done.path / name
        same_size = self._there.get(path.name) == len(data)
        self._writing.append(self._pool.submit(_write_image, path, data, same_size=same_size))
        self._wait(_AT_ONCE)
        self._paths[row["sha256"]] = name
        self._done.bytes += len(data)
        return name

    def _wait(self, most: int) -> None:
        """Wait until at most this many images are being written. Raises what went wrong with one."""
        while len(self._writing) > most:
            self._writing.popleft().result()


def _write_image(path: AnyPath, data: bytes, *, same_size: bool) -> None:
    # An interrupted run may have given this name to another image, if one that it could not read came before.
    if not (same_size and path.read_bytes() == data):
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)


def _annotation(row: dict[str, Any], image: str | None) -> dict[str, Any]:
    """An entry of the official AlignGPT annotation file, in which `similarity` counts levels from 0."""
    entry: dict[str, Any] = {"id": row["key"]}
    if image is not None:
        entry["image"] = image
    roles = {"user": "human", "assistant": "gpt"}
    turns = row["conversations"]
    if turns is None:
        turns = [{"role": "user", "text": "<image>"}, {"role": "assistant", "text": row["caption"]}]
    if image is not None and not any("<image>" in turn["text"] for turn in turns):
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), 0)
        turns = [{**t, "text": f"<image>\n{t['text']}"} if i == first else t for i, t in enumerate(turns)]
    entry["conversations"] = [{"from": roles.get(t["role"], t["role"]), "value": t["text"]} for t in turns]
    if row["level"] is not None:
        entry["similarity"] = row["level"] - 1
    return entry
