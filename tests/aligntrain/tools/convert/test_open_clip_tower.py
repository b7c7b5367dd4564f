"""An open_clip image encoder as a CLIP vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from transformers import AutoImageProcessor, CLIPVisionModel

from aligntrain.tools.convert.open_clip_tower import vision_tower_from_open_clip

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 3},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
MEAN, STD = (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)


def encoder(**settings: Any) -> Any:
    torch.manual_seed(0)
    model = open_clip.CLIP(**{**SMALL, **settings}).eval()
    with torch.no_grad():  # new biases and norms are all equal, and swapping two would go unnoticed
        for parameter in model.visual.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("quick", [False, True])
def test_every_layer_is_the_same(tmp_path: Path, quick: bool) -> None:
    model = encoder(quick_gelu=quick)
    vision_tower_from_open_clip(model.visual, MEAN, STD, tmp_path)
    tower = CLIPVisionModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        theirs = model.visual.forward_intermediates(pixels, indices=3)["image_intermediates"]
        output = tower(pixels, output_hidden_states=True)
        for layer, features in zip(output.hidden_states[1:], theirs, strict=True):
            torch.testing.assert_close(layer[:, 1:], features.flatten(2).mT, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.pooler_output @ model.visual.proj, model.encode_image(pixels))


def test_the_processor_normalises_as_the_encoder(tmp_path: Path) -> None:
    vision_tower_from_open_clip(encoder().visual, MEAN, STD, tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert tuple(processor.image_mean) == MEAN and tuple(processor.image_std) == STD
    assert processor.size["shortest_edge"] == processor.crop_size["height"] == 32


def test_a_resnet_is_refused(tmp_path: Path) -> None:
    model = encoder(vision_cfg={"image_size": 64, "layers": [1, 1, 1, 1], "width": 8})
    with pytest.raises(ValueError, match=r"ModifiedResNet.*plain vision transformers"):
        vision_tower_from_open_clip(model.visual, MEAN, STD, tmp_path)
