"""Tiny random models and batches for the tests of aligntrain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from aligntrain import AlignGPTConfig, AlignGPTForConditionalGeneration

BOS, ALIGN, IMAGE = 1, 65, 64
VOCAB, PATCHES, SIDE = 64, 9, 24
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": BOS,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}


def tiny(
    text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **settings: Any
) -> AlignGPTForConditionalGeneration:
    """A random model in training mode; the same arguments give the same weights."""
    torch.manual_seed(0)
    text = {**LLAMA, **(text or {})}
    if text["model_type"] != "llama":
        text = AutoConfig.for_model(**text).to_dict()
    attention = settings.pop("attention", "eager")
    config = AlignGPTConfig(text_config=text, vision_config={**CLIP, **(vision or {})}, **settings)
    if attention is not None:
        config._attn_implementation = attention
    model = AlignGPTForConditionalGeneration(config)
    # With the small default initialisation all logits would be near zero, and all comparisons easy.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.train()


@dataclass
class Sample:
    """One sample of a test batch."""

    ids: list[int]
    labels: list[int]
    has_image: bool


def batch(samples: list[Sample], side: str = "right", pad: int = 0) -> dict[str, torch.Tensor]:
    """Samples as padded rows."""
    length = max(len(s.ids) for s in samples)

    def rows(values: Callable[[Sample], list[int]], filler: int) -> torch.Tensor:
        padded = ((values(s), [filler] * (length - len(s.ids))) for s in samples)
        return torch.tensor([v + f if side == "right" else f + v for v, f in padded])

    return {
        "input_ids": rows(lambda s: s.ids, pad),
        "labels": rows(lambda s: s.labels, -100),
        "attention_mask": rows(lambda s: [1] * len(s.ids), 0),
    }


def packed(samples: list[Sample], padding: int = 3) -> dict[str, torch.Tensor]:
    """Samples packed into one row."""
    ids = [i for s in samples for i in s.ids] + [0] * padding
    labels = [i for s in samples for i in s.labels] + [-100] * padding
    numbers = [n for n, s in enumerate(samples, 1) for _ in s.ids] + [0] * padding
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "sequence_ids": torch.tensor([numbers]),
    }


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all gradients; clears the model's."""
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result
