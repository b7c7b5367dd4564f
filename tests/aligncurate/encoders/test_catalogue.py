"""The list of models against open_clip's own, and what listing costs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import open_clip
import pytest
from open_clip.pretrained import list_pretrained_tags_by_model

from aligncurate.encoders.catalogue import TABLE, known_models
from aligncurate.encoders.model_choice import TINY


@pytest.mark.parametrize("table", ["shipped", "of another version"])
def test_the_list_is_that_of_open_clip(monkeypatch, tmp_path, table) -> None:
    if table == "of another version":
        other = tmp_path / "table.json"
        other.write_text(json.dumps({"open_clip": "0.0", "models": []}))
        monkeypatch.setattr("aligncurate.encoders.catalogue.TABLE", other)
    tiny, *found = known_models()
    assert (tiny["model"], tiny["weights"]) == (TINY, ["built in"])
    names = [name for name in open_clip.list_models() if list_pretrained_tags_by_model(name)]
    assert [entry["model"] for entry in found] == [name for name in names if name != TINY]
    for entry in found:
        config = open_clip.get_model_config(entry["model"])
        assert entry["weights"] == list_pretrained_tags_by_model(entry["model"])
        assert entry["width"] == config["embed_dim"]
        assert entry["image_size"] == config["vision_cfg"].get("image_size", 224)


def test_listing_imports_neither_torch_nor_open_clip() -> None:
    if json.loads(TABLE.read_text("utf-8"))["open_clip"] != version("open_clip_torch"):
        pytest.skip("the table is of another version of open_clip: write it again (aligncurate/encoders/catalogue.py)")
    program = """if True:
        import sys
        from aligncurate.encoders.catalogue import known_models
        known_models()
        assert not {"torch", "open_clip", "safetensors.torch"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", program], check=True)
