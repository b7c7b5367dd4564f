"""What a run says of itself: losses by level, speed, memory, gradients, the gate and the table of levels.

MFU = FLOPs the model needs / (seconds x peak of all devices), with, per token, 2 FLOPs a parameter forward, 2 for the
gradient of what goes in and 2 for that of the parameter:

    6 N T where the LLM learns, 4 N T where it is frozen     N its decoder's parameters, T the samples' tokens
    6 or 4 V M                                               V the head's parameters, M the supervised tokens
    2 C P I                                                  C the tower's parameters, P its tokens, I the images
    6 J Q I                                                  J the projector's parameters, Q the patches

Attention's own products, recomputation and padding are not counted, so it is the lower bound of what was done.
"""

from __future__ import annotations

import importlib
import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from aligncurate.errors import UserError
from aligncurate.progress import console
from aligntrain.data.reader import MicroBatch
from aligntrain.model.heads import decoder_of
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.stage import StageConfig
from aligntrain.training.distributed import World, whole

# Dense bfloat16 FLOP/s of the vendors' data sheets, by a part of the device's name, the more special ones first.
_PEAKS = {
    "GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "MI300X": 1307e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 0.0,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """bfloat16 FLOP/s of a device by its data sheet; None where that is not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name and peak), None)


def trains_llm(config: StageConfig) -> bool:
    """Whether the LLM's own weights learn."""
    return config.stage == "finetune" and config.lora_rank is None


class Flops:
    """FLOPs that a model needs, by the formula above. Made before the model is spread over ranks."""

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
        """FLOPs for so many tokens of samples, supervised tokens and images."""
        return float(self.per_token * tokens + self.per_label * labels + self.per_image * images)


class Meters:
    """Adds up what the ranks did since the last log line.

    Args:
        levels: the highest level in the data, 0 for none.
        gate: N of a model with a gate.
        flops: of the model.
        world: the ranks.
    """

    def __init__(self, levels: int, gate: int, flops: Flops, world: World) -> None:
        self._levels, self._gate_levels, self._flops, self._world = levels, gate, flops, world
        self._peak = peak_flops(world.device)
        self._reset()

    def _reset(self) -> None:
        device = self._world.device
        self._losses = torch.zeros(self._levels + 1, 2, dtype=torch.float64, device=device)  # sum and number by level
        self._gate = torch.zeros(self._gate_levels, dtype=torch.float64, device=device)  # sums of weights, of entropy
        self._gated = self._tokens = self._images = self._paid = 0
        self._waited, self._since = 0.0, time.perf_counter()

    def add(self, batch: MicroBatch, output: Any) -> None:
        """One micro-batch of this rank; nothing is waited for."""
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

    def paid(self, tokens: int) -> None:
        """Tokens of a round's largest micro-batch, which every rank waits for."""
        self._paid += tokens

    def waited(self, seconds: float) -> None:
        """Time in which the step waited for data."""
        self._waited += seconds

    def take(self) -> dict[str, Any]:
        """The numbers since the last call, over all ranks; all ranks must ask."""
        counts = [self._gated, self._tokens, self._images, self._waited]
        told = torch.tensor(counts, dtype=torch.float64, device=self._world.device)
        sums = self._world.sum(torch.cat([self._losses.flatten(), self._gate, told])).cpu()
        seconds = time.perf_counter() - self._since
        losses, gate, told = torch.split(sums, [2 * self._levels + 2, self._gate_levels, len(counts)])
        losses = losses.view(-1, 2)
        gated, tokens, images, waited = told.tolist()
        labels = float(losses[:, 1].sum())
        found: dict[str, Any] = {
            "loss": float(losses[:, 0].sum()) / labels if labels else None,
            "loss_by_level": {level: float(s / n) for level, (s, n) in enumerate(losses) if n and level},
            "supervised_tokens_per_s": labels / seconds,
            "tokens_per_s": tokens / seconds,
            "images_per_s": images / seconds,
            "packing_efficiency": tokens / (self._paid * self._world.size) if self._paid else 1.0,
            "data_wait": waited / self._world.size / seconds,
            "peak_memory_bytes": peak_memory(self._world.device),
        }
        if losses[0, 1] and found["loss_by_level"]:
            found["loss_without_level"] = float(losses[0, 0] / losses[0, 1])
        if self._peak is not None:
            done = self._flops(tokens, labels, images)
            found["mfu"] = done / (seconds * self._peak * self._world.size)
        if gated:
            found["gate_entropy"] = float(gate[-1]) / gated
            found["gate_weights"] = [round(w, 6) for w in (gate[:-1] / gated).tolist()]
        self._reset()
        return found


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: on the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def level_cosines(table: Tensor) -> dict[str, Any]:
    """Cosines between level embeddings [N, D]: of neighbours, and the mean of all pairs."""
    unit = nn.functional.normalize(whole(table.detach()).float(), dim=1)
    cosines = (unit @ unit.T).cpu()
    pairs = cosines[torch.ones_like(cosines).triu(1).bool()]
    neighbours = [round(c, 6) for c in cosines.diagonal(1).tolist()]
    return {"level_cosine": float(pairs.mean()), "level_cosine_of_neighbours": neighbours}


class Log:
    """One record per log line: JSONL always, a line on the terminal, and the loggers that the settings name.

    Args:
        config: names the folder and the loggers.
        world: only the first rank writes.
        step: the step from which the run goes on; later lines of an earlier run are dropped.

    Raises UserError when a logger is not installed.
    """

    def __init__(self, config: StageConfig, world: World, step: int) -> None:
        self._sinks: list[Any] = []
        self._file: Any = None
        world.first_does(lambda: self._open(config, step))

    def _open(self, config: StageConfig, step: int) -> None:
        self._sinks = [_open_logger(name, config, step) for name in config.log_to]
        path = Path(config.out) / "log.jsonl"
        kept = []
        if path.is_file() and step:
            kept = [line for line in path.read_text("utf-8").splitlines() if _step_of(line) <= step]
        path.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        for close, _ in self._sinks:
            close()

    def write(self, record: Mapping[str, Any], total: int) -> None:
        """One record; ``total`` is the run's number of steps."""
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for _, send in self._sinks:
            send(flatten(record), record["step"])
        console.print(line_of(record, total), soft_wrap=True)


def line_of(record: Mapping[str, Any], total: int) -> str:
    """A record in one line for people."""
    loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
    parts = [f"[bold]{record['step']:>{len(str(total))}}/{total}[/]", f"loss [cyan]{loss}[/]"]
    if record["loss_by_level"]:
        worst, best = min(record["loss_by_level"]), max(record["loss_by_level"])
        parts.append(f"level {worst} {record['loss_by_level'][worst]:.3f}, {best} {record['loss_by_level'][best]:.3f}")
    parts.append(f"lr {record['lr']:.2e}")
    parts.append(f"norm {record['grad_norm']:.2f}")
    parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
    parts.append(f"packed {record['packing_efficiency']:.0%}")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.0%}")
    if record["data_wait"] > 0.01:
        parts.append(f"[yellow]waited for data {record['data_wait']:.0%}[/]")
    if record["unreadable_images"]:
        parts.append(f"[yellow]{record['unreadable_images']:,} images unreadable[/]")
    return "  ".join(parts)


def flatten(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers under one name each: ``loss_by_level/3``, ``gate_weights/1``."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{key}": v for key, v in value.items()}
        elif isinstance(value, list):
            flat |= {f"{name}/{number}": v for number, v in enumerate(value, 1)}
        elif isinstance(value, int | float) and math.isfinite(value):
            flat[name] = value
    return flat


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the line that a killed run was writing
        return math.inf


def _open_logger(name: str, config: StageConfig, step: int) -> tuple[Any, Any]:
    """How to close a logger, and how to send it numbers from ``step`` on."""
    module = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    try:
        library = importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"log_to names {name}, which is not installed; `pip install {name}`, or leave it out."
        ) from None
    if name == "tensorboard":
        # What a run wrote after the checkpoint from which this one goes on is not shown twice.
        writer = library.SummaryWriter(str(Path(config.out) / "tensorboard"), purge_step=step + 1)

        def send(numbers: Mapping[str, float], step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)

        return writer.close, send
    place = {"dir": config.out} if name == "wandb" else {}  # rather than where the command happened to be run
    run = library.init(project="aligntrain", name=Path(config.out).name, config=config.to_json(), **place)
    return run.finish, lambda numbers, step: run.log(dict(numbers), step=step)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
