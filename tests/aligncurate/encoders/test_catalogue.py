"""The list of models against open_clip's own, and what listing costs."""

import subprocess
import sys

import open_clip
from open_clip.pretrained import list_pretrained_tags_by_model

from aligncurate.encoders.catalogue import known_models
from aligncurate.encoders.load import TINY


def test_the_list_is_that_of_open_clip() -> None:
    tiny, *found = known_models()
    assert (tiny["model"], tiny["weights"]) == (TINY, ["built in"])
    names = [name for name in open_clip.list_models() if list_pretrained_tags_by_model(name)]
    assert [entry["model"] for entry in found] == [name for name in names if name != TINY]
    for entry in found:
        config = open_clip.get_model_config(entry["model"])
        assert entry["weights"] == list_pretrained_tags_by_model(entry["model"])
        assert entry["width"] == config["embed_dim"]
        assert entry["image_size"] == config["vision_cfg"].get("image_size", 224)


def test_listing_imports_neither_torch_nor_open_clip_and_leaves_both_usable() -> None:
    program = """if True:
        import sys
        from aligncurate.encoders.catalogue import known_models
        known_models()
        assert not {"torch", "open_clip", "safetensors.torch"} & sys.modules.keys()
        import open_clip.pretrained
        assert open_clip.pretrained._has_safetensors
    """
    subprocess.run([sys.executable, "-c", program], check=True)
