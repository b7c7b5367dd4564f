"""Export as LLaVA: `annotations.json` with AlignGPT's `similarity`, and a folder of images."""

from __future__ import annotations

import json
from typing import Any

from aligncurate.dataset.pointers import POINTER_COLUMNS, Pointer
from aligncurate.dataset.reader import Dataset
from aligncurate.io import storage
from aligncurate.io.files import TEMPORARY, atomic_file
from aligncurate.io.paths import AnyPath, names, sizes
from aligncurate.progress import Meter
from aligncurate.verbs.export.plan import exportable_rows
from aligncurate.verbs.export.result import Exported
from aligncurate.verbs.export.sample import free_name, image_ending, safe_name

_COLUMNS = (*POINTER_COLUMNS, "image", "key", "caption", "conversations", "level")
_IMAGES = "images"
_PER_FOLDER = 10_000  # images in one folder
_NAME_BYTES = 180  # of the key; most file systems allow names of 255 bytes


def write_llava(dataset: Dataset, done: Exported, progress: Meter) -> None:
    """Write the images and `annotations.json`; rows whose image cannot be read go to `done.failed`."""
    taken: set[str] = set()
    images: dict[bytes, str] = {}  # sha256 -> path; an image that several rows share is written once
    with atomic_file(done.path / "annotations.json") as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for number, row in enumerate(exportable_rows(dataset, _COLUMNS)):
            row["key"] = f"row-{number}" if row["key"] is None else row["key"]  # of a dataset from elsewhere
            pointer = Pointer.of(row)
            try:
                data = pointer.read() if pointer and row["sha256"] not in images else None
            except OSError as error:
                done.failed.append({"key": row["key"], "error": str(error)})
                progress.add(1, 0, 1)
                continue
            if data is not None:
                images[row["sha256"]] = _write_image(row, data, done, taken, len(images))
            name = images[row["sha256"]] if pointer else None
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


def _write_image(row: dict[str, Any], data: bytes, done: Exported, taken: set[str], number: int) -> str:
    """Write image `number`; return its path relative to the export's folder."""
    folder = f"{_IMAGES}/{number // _PER_FOLDER:05d}"
    stem = safe_name(row["key"]).replace("/", "_").encode()[:_NAME_BYTES].decode(errors="ignore")
    name = f"{free_name(f'{folder}/{stem}', taken)}.{image_ending(row, data)}"
    path = done.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # An interrupted run may have given this name to another image, if one that it could not read came before.
    if not (path.is_file() and storage.size(str(path)) == len(data) and path.read_bytes() == data):
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
    done.bytes += len(data)
    return name


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
