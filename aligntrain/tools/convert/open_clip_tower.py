"""Turn an open_clip image encoder into a Hugging Face vision tower, to reuse the encoder that scored the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from aligncurate.errors import UserError

_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def vision_tower_from_open_clip(visual: Any, mean: tuple[float, ...], std: tuple[float, ...], folder: Path) -> None:
    """Save the vision half of an open_clip model as a Hugging Face CLIP vision tower with its image processor.

    Args:
        visual: ``model.visual`` of an open_clip model, a plain vision transformer as OpenAI's are.
        mean, std: per channel, of the normalisation that the encoder expects.
        folder: output folder.

    Raises:
        UserError: the encoder is not a plain vision transformer (a ResNet, a timm model, attentional pooling).
    """
    weights = dict(visual.state_dict())
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    plain = {"conv1.weight", "class_embedding", "positional_embedding", "ln_pre.weight", "ln_post.weight"}
    if blocks is None or not plain <= set(weights) or getattr(visual, "attn_pool", None) is not None:
        raise UserError(f"{type(visual).__name__}: only plain vision transformers with a class token can be converted.")
    width, _, patch_size, _ = weights["conv1.weight"].shape
    side = round((len(weights["positional_embedding"]) - 1) ** 0.5)
    activation = type(blocks[0].mlp.gelu).__name__
    if activation not in ("GELU", "QuickGELU"):
        raise UserError(f"the encoder's activation is {activation}; only GELU and QuickGELU can be converted.")
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=len(weights["transformer.resblocks.0.mlp.c_fc.weight"]),
            num_hidden_layers=len(blocks),
            num_attention_heads=blocks[0].attn.num_heads,
            image_size=side * patch_size,
            patch_size=patch_size,
            hidden_act="gelu" if activation == "GELU" else "quick_gelu",
            layer_norm_eps=blocks[0].ln_1.eps,
        )
    ).to(weights["conv1.weight"].dtype)
    renamed = {
        "embeddings.class_embedding": weights["class_embedding"],
        "embeddings.patch_embedding.weight": weights["conv1.weight"],
        "embeddings.position_embedding.weight": weights["positional_embedding"],
    }
    for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):  # the typo is transformers'
        renamed |= {f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    for number in range(len(blocks)):
        theirs, ours = f"transformer.resblocks.{number}", f"encoder.layers.{number}"
        for kind in ("weight", "bias"):
            for old, new in _BLOCK.items():
                renamed[f"{ours}.{new}.{kind}"] = weights[f"{theirs}.{old}.{kind}"]
            for name, part in zip("qkv", weights[f"{theirs}.attn.in_proj_{kind}"].chunk(3), strict=True):
                renamed[f"{ours}.self_attn.{name}_proj.{kind}"] = part
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in tower.state_dict()) else ""
    tower.load_state_dict({prefix + name: weight.contiguous() for name, weight in renamed.items()})
    edge = side * patch_size
    processor = CLIPImageProcessor(
        size={"shortest_edge": edge},
        crop_size={"height": edge, "width": edge},
        image_mean=list(mean),
        image_std=list(std),
    )
    tower.save_pretrained(folder)
    processor.save_pretrained(folder)
