"""What a stage needs on one device, before it is run: weights, gradients, optimizer, activations, logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aligntrain.model.build import layers_of
from aligntrain.model.configuration import AlignGPTConfig
from aligntrain.model.loss import CHUNK_TOKENS
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.stage import StageConfig


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: float32 masters of what learns, the rest in the dtype of the computation, and the copies in that dtype
            that autocast or FSDP2 makes of the masters.
        gradients, optimizer: float32, and AdamW's two moments.
        activations: of one micro-batch, kept for the backward pass; an estimate for a Llama-like decoder.
        logits: of one chunk of supervised tokens, with their gradient.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate_memory(model_config: AlignGPTConfig, config: StageConfig, ranks: int = 1) -> Memory:
    """What one of so many ranks needs. No weights are made.

    The first three parts follow from the shapes. Activations are those of a Llama-like layer whose attention keeps no
    scores (SDPA, FlashAttention): per token its norms' inputs, queries, keys, values, attention's output and the
    MLP's four intermediates. With ``checkpointing`` every layer keeps its input, and one layer all of that.
    """
    with torch.device("meta"):
        model = AlignGPTForConditionalGeneration(model_config)
    learning = model.set_stage(config.stage)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    learns = {name: sizes[name] for name in learning}
    if config.lora_rank is not None:
        learns = {name: size for name, size in learns.items() if not name.startswith("language_model.")}
        adapters = sum(
            config.lora_rank * sum(parameter.shape)
            for layer in layers_of(model.language_model)
            for parameter in layer.parameters()
            if parameter.ndim == 2
        )
        learns["adapters"] = adapters
    half = 2 if config.dtype == "bf16" else 4
    frozen = sum(size for name, size in sizes.items() if name not in learns)
    learned = sum(learns.values())
    copies = learned * half if config.dtype == "bf16" else 0
    share = ranks if ranks > 1 and _is_sharded(config) else 1
    weights = 4 * learned + half * frozen
    if share > 1:
        # Two layers are whole at a time, the one in use and the next; what is no layer stays whole.
        layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model.language_model)]
        rest = sum(sizes.values()) - sum(layers) - sum(
            p.numel() for layer in layers_of(model.vision_tower) for p in layer.parameters()
        )  # fmt: skip
        copies = half * (2 * max(layers) + rest)
    return Memory(
        weights=weights // share + copies,
        gradients=4 * learned // share,
        optimizer=8 * learned // share,
        activations=_activations(model, config, half),
        logits=CHUNK_TOKENS * model_config.text_config.vocab_size * (half + 4 + 4),
    )


def _is_sharded(config: StageConfig) -> bool:
    return config.parallel == "fsdp" or (config.parallel == "auto" and config.stage == "finetune")


def _activations(model: AlignGPTForConditionalGeneration, config: StageConfig, half: int) -> int:
    text = model.config.text_config
    width, depth = text.hidden_size, len(layers_of(model.language_model))
    heads = text.num_attention_heads
    key_width = width * getattr(text, "num_key_value_heads", heads) // heads
    inner = getattr(text, "intermediate_size", 4 * width)
    # Norms compute in float32, and keep their input and what they made of it.
    norms = 2 * (half + 4) * width + 2 * half * width
    attention = half * (3 * width + 3 * key_width)
    mlp = half * 4 * inner
    one = norms + attention + mlp
    layers = half * width * depth + one if config.checkpointing else one * depth
    ends = norms // 2 + half * width  # the last norm, and the embeddings
    return int(config.token_budget * (layers + ends))
