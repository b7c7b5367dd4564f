"""AdamW, the learning rate schedule, and the gradients: their norms and clipping."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aligntrain.stage import StageConfig
from aligntrain.training.distributed import World


def make_optimizer(model: nn.Module, config: StageConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay applies to matrices only.

    Each group's `peak` is the learning rate that `schedule` multiplies.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module, is_matrix = name.partition(".")[0], parameter.ndim > 1
            new = {
                "params": [],
                "peak": peak_of(module, config),
                "weight_decay": config.weight_decay if is_matrix else 0.0,
            }
            groups.setdefault((module == "projector", is_matrix), new)["params"].append(parameter)
    return torch.optim.AdamW(
        list(groups.values()),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=config.fused and device.type == "cuda",
    )


def peak_of(module: str, config: StageConfig) -> float:
    """Peak learning rate of a module of the model; the projector may have its own, as in LLaVA (`mm_projector_lr`)."""
    return config.learning_rate if module != "projector" or config.projector_lr is None else config.projector_lr


def schedule(config: StageConfig, step: int, total: int) -> float:
    """The share of the peak learning rate in a step: linear warm-up, then half a cosine down towards 0; never 0.

    Like `get_cosine_schedule_with_warmup` of transformers, but the warm-up is one step ahead: there the first step has
    learning rate 0, and a run of one step would change nothing.
    """
    warmup = math.ceil(total * config.warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@torch.no_grad()
def gradient_norms(model: nn.Module, world: World) -> dict[str, float]:
    """2-norm of the gradient of each trained module: projector, level_embeddings, gate, language_model.

    Sharded gradients are summed over the ranks, so every rank must call it.
    """
    parts: dict[str, list[Tensor]] = {}
    sharded = False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            grad = parameter.grad
            sharded |= isinstance(grad, DTensor)
            parts.setdefault(name.partition(".")[0], []).append(grad.to_local() if isinstance(grad, DTensor) else grad)
    norms = [torch.stack(torch._foreach_norm(grads)).double() for grads in parts.values()]
    squares = torch.stack([norm.square().sum() for norm in norms])
    if sharded:
        world.sum(squares)
    return dict(zip(parts, squares.sqrt().tolist(), strict=True))


def total_norm(norms: dict[str, float]) -> float:
    """2-norm over all modules."""
    return math.sqrt(sum(norm * norm for norm in norms.values()))


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.Optimizer, norm: float, max_norm: float) -> None:
    """Scale the gradients, whose 2-norm is `norm`, down to `max_norm`; 0 disables it."""
    scale = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
    if scale < 1:
        for group in optimizer.param_groups:
            torch._foreach_mul_([p.grad for p in group["params"]], scale)
