"""Estimate the memory of a training stage on one device: weights, gradients, optimizer, activations, logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aligntrain.model.configuration import AlignGPTConfig
from aligntrain.model.loss import CHUNK_TOKENS
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.stage import StageConfig
from aligntrain.training.build import layers_of


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: float32 master weights of what is trained, the rest in the compute dtype, and the copies in that
            dtype that autocast or FSDP2 makes of the master weights.
        gradients: in float32.
        optimizer: AdamW's two moments, in float32.
        activations: kept for the backward pass of one micro-batch; approximate, for a Llama-like decoder.
        logits: of one chunk of supervised tokens, with their gradients.
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
    """Estimate what each of ``ranks`` devices needs, without allocating any weights.

    Weights, gradients and optimizer follow from the shapes. Activations are those of a Llama-like layer whose attention
    stores no scores (SDPA, FlashAttention): per token the norms' inputs, queries, keys, values, the attention output
    and the MLP's four intermediates. With ``checkpointing`` each layer stores its input, and one layer all of these.
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
    trained = sum(learns.values())
    copies = trained * half if config.dtype == "bf16" else 0
    share = ranks if ranks > 1 and _is_sharded(config) else 1
    weights = 4 * trained + half * frozen
    if share > 1:
        # Two layers are gathered at a time, the current one and the next; what is outside the layers stays gathered.
        layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model.language_model)]
        rest = sum(sizes.values()) - sum(layers) - sum(
            p.numel() for layer in layers_of(model.vision_tower) for p in layer.parameters()
        )  # fmt: skip
        copies = half * (2 * max(layers) + rest)
    return Memory(
        weights=weights // share + copies,
        gradients=4 * trained // share,
        optimizer=8 * trained // share,
        activations=_activations(model, config, half),
        # At the peak, in the backward pass: log-probabilities and the gradients of these and of the logits, in float32.
        logits=12 * CHUNK_TOKENS * model_config.text_config.vocab_size,
    )


def _is_sharded(config: StageConfig) -> bool:
    return config.parallel == "fsdp" or (config.parallel == "auto" and config.stage == "finetune")


def _activations(model: AlignGPTForConditionalGeneration, config: StageConfig, half: int) -> int:
    text = model.config.text_config
    width, depth = text.hidden_size, len(layers_of(model.language_model))
    heads = text.num_attention_heads
    key_width = width * getattr(text, "num_key_value_heads", heads) // heads
    inner = getattr(text, "intermediate_size", 4 * width)
    # Norms compute in float32, and store their input and their output.
    norms = 2 * (half + 4) * width + 2 * half * width
    attention = half * (3 * width + 3 * key_width)
    mlp = half * 4 * inner
    one = norms + attention + mlp
    layers = half * width * depth + one if config.checkpointing else one * depth
    ends = norms // 2 + half * width  # the last norm, and the embeddings
    return int(config.token_budget * (layers + ends))
