"""FLOPs that training needs, the peak FLOP/s of GPUs, and so the model FLOPs utilisation (MFU).

MFU = FLOPs the model needs / (seconds x peak of all devices). Each parameter costs 2 FLOPs per token forward, 2 for
the gradient of its input and 2 for its own gradient:

    6 N T if the LLM is trained, 4 N T if frozen     N parameters of its decoder, T tokens of samples
    6 or 4 V M                                       V parameters of its head, M supervised tokens
    2 C P I                                          C parameters of the tower, P its tokens, I images
    6 J Q I                                          J parameters of the projector, Q patches

Attention scores, recomputation and padding are not counted, so the real utilisation is higher.
"""

from __future__ import annotations

import torch
from torch import nn

from aligntrain.model.llm import decoder_of
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.stage import StageConfig

# Dense bfloat16 FLOP/s from the vendors' data sheets, by a part of the device's name, specific names first.
_PEAKS = {
    "GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "MI300X": 1307e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 0.0,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """bfloat16 FLOP/s of a device from its data sheet; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name and peak), None)


def trains_llm(config: StageConfig) -> bool:
    """Whether the LLM's own weights are trained."""
    return config.stage == "finetune" and config.lora_rank is None


class Flops:
    """FLOPs that a model needs, by the formula above. Create it before the model is sharded."""

    def __init__(self, model: AlignGPTForConditionalGeneration, llm_learns: bool) -> None:
        config, lm = model.config, model.language_model
        decoder = decoder_of(lm)
        table = _count(lm.get_input_embeddings())
        per_parameter = 6 if llm_learns else 4
        self.per_token = per_parameter * (_count(decoder) - table)
        self.per_label = per_parameter * _count(lm.get_output_embeddings())
        tower = config.vision_config
        side = tower.image_size // tower.patch_size
        tiles = sum((scale // tower.image_size) ** 2 for scale in config.s2_scales or [tower.image_size])
        self.per_image = 2 * _count(model.vision_tower) * (side * side + config.has_class_token) * tiles
        self.per_image += 6 * _count(model.projector) * config.num_patches

    def __call__(self, tokens: float, labels: float, images: float) -> float:
        """FLOPs for a number of sample tokens, supervised tokens and images."""
        return float(self.per_token * tokens + self.per_label * labels + self.per_image * images)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
