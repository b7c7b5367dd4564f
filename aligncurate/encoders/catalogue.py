"""The models that `--model` accepts, from a table of open_clip's models, so that listing them does not import torch.

Importing open_clip takes seconds, the table milliseconds. It holds for one version of open_clip; with any other,
open_clip itself is asked. After an upgrade, write it again with `python -m aligncurate.encoders.catalogue`.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aligncurate.encoders.model_choice import TINY, TINY_FOLDER

TABLE = Path(__file__).parent / "builtin" / "open_clip_models.json"


def known_models() -> list[dict[str, Any]]:
    """Name, weights, input size in pixels and embedding width of each model that has weights; `tiny` first."""
    config = json.loads((TINY_FOLDER / "tiny.json").read_text("utf-8"))
    table = json.loads(TABLE.read_text("utf-8"))
    models = table["models"] if table["open_clip"] == version("open_clip_torch") else open_clip_models()
    return [_entry(TINY, config, ["built in"]), *models]


def open_clip_models() -> list[dict[str, Any]]:
    """The same for open_clip's own models, asked of open_clip."""
    import open_clip
    from open_clip.pretrained import list_pretrained_tags_by_model

    names = [name for name in open_clip.list_models() if name != TINY and list_pretrained_tags_by_model(name)]
    return [_entry(name, open_clip.get_model_config(name), list_pretrained_tags_by_model(name)) for name in names]


def _entry(name: str, config: dict[str, Any], weights: list[str]) -> dict[str, Any]:
    size = config["vision_cfg"].get("image_size", 224)
    return {"model": name, "weights": weights, "image_size": size, "width": config["embed_dim"]}


if __name__ == "__main__":
    lines = ",\n".join(f"  {json.dumps(model)}" for model in open_clip_models())
    TABLE.write_text(f'{{"open_clip": "{version("open_clip_torch")}", "models": [\n{lines}\n]}}\n', "utf-8")
