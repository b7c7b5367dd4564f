"""The list of models that `--model` accepts, from open_clip's own tables but without importing torch."""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from aligncurate.encoders.load import TINY, TINY_FOLDER


def known_models() -> list[dict[str, Any]]:
    """What `--model` accepts: name, input size in pixels, embedding width and weights of each."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    tags_of = _pretrained_table(folder).list_pretrained_tags_by_model
    files = sorted((folder / "model_configs").glob("*.json"), key=lambda file: _natural(file.stem))
    others = [(file, tags_of(file.stem)) for file in files if file.stem != TINY]
    tiny = (TINY_FOLDER / "tiny.json", ["built in"])
    return [_entry(file, weights) for file, weights in (tiny, *others) if weights]


def _entry(config: Path, weights: list[str]) -> dict[str, Any]:
    found = json.loads(config.read_text("utf-8"))
    size = found["vision_cfg"].get("image_size", 224)
    return {"model": config.stem, "weights": weights, "image_size": size, "width": found["embed_dim"]}


def _pretrained_table(folder: Path) -> ModuleType:
    """open_clip's module `pretrained` by itself, in a package of another name, and without torch."""
    name = "_open_clip_tables"
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    # The one module through which it would import torch; it can do without, where it only has to list.
    heavy, before = "safetensors.torch", sys.modules.get("safetensors.torch")
    sys.modules[name] = package
    if before is None:
        sys.modules[heavy] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(f"{name}.pretrained")
    finally:
        if before is None:
            del sys.modules[heavy]


def _natural(name: str) -> list[Any]:
    """Sorts names as open_clip does: numbers in them as numbers."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name.lower())]
