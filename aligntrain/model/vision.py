"""Vision: features of the tower at one or several scales, and the projector.

Shapes: I images, T tiles, P patches, C the tower's width, S scales, H = W pixels.
"""

from __future__ import annotations

from itertools import chain, pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from aligntrain.model.configuration import AlignGPTConfig, projector_depth


def build_projector(projector_type: str, in_size: int, out_size: int) -> nn.Sequential:
    """``linear`` or ``mlp{k}x_gelu`` as a Sequential, numbered as in the official ``mm_projector.{0,2,...}``."""
    widths = [in_size] + [out_size] * projector_depth(projector_type)
    linears = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(linears[0], *chain.from_iterable((nn.GELU(), linear) for linear in linears[1:]))


def vision_features(tower: nn.Module, pixels: Tensor, config: AlignGPTConfig) -> Tensor:
    """The projector's input for each image.

    Args:
        tower: a CLIP or SigLIP vision model.
        pixels: [I, 3, H, H], normalised, H = config.pixel_size.
        config: selects the layer, the tokens and the scales.

    Returns:
        [I, P, S*C] in the tower's dtype.

    Raises:
        ValueError: the pixels have another size.
    """
    size = config.pixel_size
    if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
        raise ValueError(f"pixel_values has shape {tuple(pixels.shape)}; expected [images, 3, {size}, {size}].")
    pixels = pixels.to(next(tower.parameters()).dtype)
    if config.s2_scales is None:
        return _tower_tokens(tower, pixels, config)
    base = config.vision_config.image_size
    scales = [_scale_features(tower, pixels, scale, scale // base, config) for scale in config.s2_scales]
    return torch.cat(scales, dim=-1)


def _tower_tokens(tower: nn.Module, pixels: Tensor, config: AlignGPTConfig) -> Tensor:
    # An index instead of True: transformers then keeps the hidden states of that layer only.
    output = tower(pixels, output_hidden_states=config.vision_layer)
    tokens: Tensor = output.hidden_states[config.vision_layer]
    return tokens[:, 1:] if config.has_class_token and config.vision_select == "patch" else tokens


def _scale_features(tower: nn.Module, pixels: Tensor, scale: int, tiles: int, config: AlignGPTConfig) -> Tensor:
    """One scale of S2 (arXiv 2403.13043, ``s2wrapper``): [I, 3, H, H] -> [I, P, C].

    The image is resized to ``scale`` and cut into ``tiles`` x ``tiles`` squares of the tower's input size. Their
    feature maps are joined and averaged down to the grid of one square.
    """
    num_images, base = pixels.shape[0], config.vision_config.image_size
    if pixels.shape[-1] != scale:
        pixels = interpolate(pixels.float(), size=(scale, scale), mode="bicubic").to(pixels.dtype)
    # [I, 3, (row y), (column x)] -> the tiles of one image are adjacent, row by row
    tile_pixels = pixels.reshape(num_images, 3, tiles, base, tiles, base).permute(0, 2, 4, 1, 3, 5)
    tokens_TPC = _tower_tokens(tower, tile_pixels.flatten(0, 2), config)
    if tiles == 1:
        return tokens_TPC
    side = base // config.vision_config.patch_size
    grid = tokens_TPC.reshape(num_images, tiles, tiles, side, side, -1).permute(0, 5, 1, 3, 2, 4)
    grid = grid.flatten(4, 5).flatten(2, 3)  # [I, C, tiles*side, tiles*side]
    pooled = interpolate(grid.float(), size=(side, side), mode="area").to(grid.dtype)
    return pooled.flatten(2).transpose(1, 2)
