"""Training metrics over all ranks: losses by level, speed, memory, the gate and the level embeddings."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from aligntrain.data.reader import MicroBatch
from aligntrain.training.distributed import World, whole
from aligntrain.training.flops import Flops, peak_flops


class Metrics:
    """Sums what the ranks did since the last log line.

    Args:
        levels: highest level in the data, 0 without levels.
        gate_levels: number of levels N of the model, 0 without alignment.
        flops: FLOPs of the model.
        world: all ranks.
    """

    def __init__(self, levels: int, gate_levels: int, flops: Flops, world: World) -> None:
        self._levels, self._gate_levels, self._flops, self._world = levels, gate_levels, flops, world
        self._peak = peak_flops(world.device)
        self.reset()

    def reset(self) -> None:
        """Start counting from zero, and from now."""
        device = self._world.device
        self._losses = torch.zeros(self._levels + 1, 2, dtype=torch.float64, device=device)  # sum and count by level
        self._gate = torch.zeros(self._gate_levels, dtype=torch.float64, device=device)  # N - 1 weights, entropy
        self._gated = self._tokens = self._images = self._computed = 0
        self._waited, self._since = 0.0, time.perf_counter()

    def add(self, batch: MicroBatch, output: Any) -> None:
        """Add one micro-batch of this rank, without waiting for the device."""
        losses_M = output.token_losses.double()
        sums = torch.stack([losses_M, torch.ones_like(losses_M)], 1)
        self._losses.index_add_(0, batch.token_levels, sums)
        self._tokens += batch.tokens
        self._images += batch.images
        if output.gate_weights is not None:
            alpha_IN1 = output.gate_weights.detach().double()
            entropy = -(alpha_IN1 * alpha_IN1.clamp(min=1e-12).log()).sum()
            self._gate += torch.cat([alpha_IN1.sum(0), entropy[None]])
            self._gated += len(alpha_IN1)

    def add_computed(self, tokens: int) -> None:
        """Add the tokens of a round's largest micro-batch, which all ranks wait for."""
        self._computed += tokens

    def add_wait(self, seconds: float) -> None:
        """Add time that a step waited for data."""
        self._waited += seconds

    def take(self) -> dict[str, Any]:
        """The metrics since the last call, over all ranks; every rank must call it."""
        counts = [self._gated, self._tokens, self._images, self._waited]
        counts_here = torch.tensor(counts, dtype=torch.float64, device=self._world.device)
        sums = self._world.sum(torch.cat([self._losses.flatten(), self._gate, counts_here])).cpu()
        seconds = time.perf_counter() - self._since
        losses, gate, totals = torch.split(sums, [2 * self._levels + 2, self._gate_levels, len(counts)])
        losses = losses.view(-1, 2)
        gated, tokens, images, waited = totals.tolist()
        labels = float(losses[:, 1].sum())
        metrics: dict[str, Any] = {
            "loss": float(losses[:, 0].sum()) / labels if labels else None,
            "loss_by_level": {level: float(s / n) for level, (s, n) in enumerate(losses) if n and level},
            "supervised_tokens_per_s": labels / seconds,
            "tokens_per_s": tokens / seconds,
            "images_per_s": images / seconds,
            "packing_efficiency": tokens / (self._computed * self._world.size) if self._computed else 1.0,
            "data_wait": waited / self._world.size / seconds,
            "peak_memory_bytes": peak_memory(self._world.device),
        }
        if losses[0, 1] and metrics["loss_by_level"]:
            metrics["loss_without_level"] = float(losses[0, 0] / losses[0, 1])
        if self._peak is not None:
            done = self._flops(tokens, labels, images)
            metrics["mfu"] = done / (seconds * self._peak * self._world.size)
        if gated:
            metrics["gate_entropy"] = float(gate[-1]) / gated
            metrics["gate_weights"] = [round(w, 6) for w in (gate[:-1] / gated).tolist()]
        self.reset()
        return metrics


def peak_memory(device: torch.device) -> int:
    """Peak bytes in use so far: on the GPU, or by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def level_cosines(table: Tensor) -> dict[str, Any]:
    """Cosines between level embeddings [N, D]: between neighbours, and the mean over all pairs."""
    unit = nn.functional.normalize(whole(table.detach()).float(), dim=1)
    cosines = (unit @ unit.T).cpu()
    pairs = cosines[torch.ones_like(cosines).triu(1).bool()]
    neighbours = [round(c, 6) for c in cosines.diagonal(1).tolist()]
    return {"level_cosine": float(pairs.mean()), "level_cosine_of_neighbours": neighbours}
