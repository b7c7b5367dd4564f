"""Export as LLaVA annotations, with the images beside them and AlignGPT's `similarity`."""

from __future__ import annotations

import json
from typing import Any

from aligncurate.dataset.pointers import Pointer
from aligncurate.dataset.reader import Dataset
from aligncurate.io.files import atomic_file
from aligncurate.progress import Meter
from aligncurate.verbs.export.names import free_name, image_ending, safe_name
from aligncurate.verbs.export.result import Exported
from aligncurate.verbs.export.rows import exportable_rows

_PER_FOLDER = 10_000  # images in one folder
_NAME_BYTES = 180  # most file systems end names at 255


def write_llava(dataset: Dataset, done: Exported, shown: Meter) -> None:
    names: set[str] = set()
    images: dict[bytes, str] = {}  # an image that several rows share is written once
    with atomic_file(done.path / "annotations.json") as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for row in exportable_rows(dataset):
            pointer = Pointer.of(row)
            try:
                data = pointer.read() if pointer and row["sha256"] not in images else None
            except OSError as error:
                done.failed.append({"key": row["key"], "error": str(error)})
                shown.add(1, 0, 1)
                continue
            if data is not None:
                images[row["sha256"]] = _llava_image(row, data, done, names, len(images))
            name = images[row["sha256"]] if pointer else None
            file.write(",\n" if done.rows else "\n")
            file.write(json.dumps(_llava_row(row, name), ensure_ascii=False))
            done.rows += 1
            shown.add(1, 1, 0)
        file.write("\n]\n")
    done.files.append("annotations.json")


def _llava_image(row: dict[str, Any], data: bytes, done: Exported, names: set[str], number: int) -> str:
    """Write an image; its path relative to the export's folder."""
    folder = f"images/{number // _PER_FOLDER:05d}"
    stem = safe_name(row["key"]).replace("/", "_").encode()[:_NAME_BYTES].decode(errors="ignore")
    name = f"{free_name(f'{folder}/{stem}', names)}.{image_ending(row, data)}"
    path = done.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # An earlier try may have given this name to another image, if one before it could not be read then.
    if not (path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data):
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
    done.bytes += len(data)
    return name


def _llava_row(row: dict[str, Any], image: str | None) -> dict[str, Any]:
    """An entry of the official AlignGPT annotation file. Its `similarity` counts levels from 0."""
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
