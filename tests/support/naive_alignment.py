"""Naive twins of alignment, loss and S2 with a loop per index; the oracles of the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def gate_dots(features: Tensor, text: list[Tensor]) -> Tensor:
    """[I, P, D] and each image's text embeddings [m, D] -> [I, P]."""
    rows = []
    for patches, words in zip(features, text, strict=True):
        mean = sum(words, torch.zeros(features.shape[-1])) / max(len(words), 1)
        rows.append(torch.stack([(patch * mean).sum() for patch in patches]))
    return torch.stack(rows)


def alpha(gate: torch.nn.Module, dots: Tensor) -> Tensor:
    """softmax(W2 GELU(W1 v + b1) + b2), written out."""
    first, second = gate.mlp[0], gate.mlp[2]
    rows = []
    for v in dots:
        hidden = first.weight @ v + first.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        exponents = (second.weight @ hidden + second.bias).exp()
        rows.append(exponents / exponents.sum())
    return torch.stack(rows)


def align(mode: str, table: Tensor, weights: Tensor) -> Tensor:
    """The alignment vector of each image; levels count from 1, as in the paper."""
    levels = {level: table[level - 1] for level in range(1, len(table) + 1)}
    best = len(table)
    rows = []
    for a in weights:
        local = sum((a[i - 1] * levels[i] for i in range(1, best)), torch.zeros_like(levels[1]))
        rows.append(
            {
                "gated": levels[best] + local,
                "local": local,
                "global": levels[best],
                "average": levels[best] + sum(levels[i] for i in range(1, best)) / (best - 1),
            }.get(mode, levels.get(int(mode.partition(":")[2] or 1)))
        )
    return torch.stack(rows)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax at every label, from full logits [B, L, V]."""
    rows = []
    for row_logits, row_labels in zip(logits, labels, strict=True):
        learned = [t for t in range(1, len(row_labels)) if row_labels[t] != -100]
        rows += [-row_logits[t - 1].log_softmax(-1)[row_labels[t]] for t in learned]
    return torch.stack(rows)


def s2(tower: torch.nn.Module, pixels: Tensor, scales: list[int], layer: int, patch: int) -> Tensor:
    """Multi-scale features of each image on its own, tile by tile (arXiv 2403.13043)."""
    base = scales[0]
    side = base // patch
    images = []
    for image in pixels:
        maps = []
        for scale in scales:
            resized = image[None]
            if scale != image.shape[-1]:
                resized = interpolate(resized, size=(scale, scale), mode="bicubic")
            count = scale // base
            whole = torch.zeros(tower.config.hidden_size, side * count, side * count)
            for y in range(count):
                for x in range(count):
                    tile = resized[:, :, y * base : (y + 1) * base, x * base : (x + 1) * base]
                    tokens = tower(tile, output_hidden_states=True).hidden_states[layer][0, 1:]
                    grid = tokens.T.reshape(-1, side, side)
                    whole[:, y * side : (y + 1) * side, x * side : (x + 1) * side] = grid
            mean = torch.zeros(whole.shape[0], side, side)
            for y in range(side):
                for x in range(side):
                    area = whole[:, y * count : (y + 1) * count, x * count : (x + 1) * count]
                    mean[:, y, x] = area.mean((1, 2))
            maps.append(mean)
        images.append(torch.cat(maps).flatten(1).T)
    return torch.stack(images)
