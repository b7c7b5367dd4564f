"""Preview a training stage without running it: steps, packing, tokens, levels, skipped rows, time, memory."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from aligntrain.data.index import Facts
from aligntrain.data.indexing import build_index, open_data
from aligntrain.data.levels import warn_of_levels, with_levels_of
from aligntrain.data.schedule import plan_epoch, total_steps
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.stage import StageConfig
from aligntrain.tools.memory import Memory, estimate_memory
from aligntrain.training.build import build_config, build_processor
from aligntrain.training.flops import Flops, peak_flops, trains_llm

ASSUMED_UTILISATION = 0.4


@dataclass(frozen=True)
class Preview:
    """What a training stage would do.

    Attributes:
        facts: statistics of the data's rows, and why some are skipped.
        steps: optimizer steps in the stage.
        micro_batches: per rank, in the first epoch.
        efficiency: of packing in the first epoch, see ``Plan.efficiency``.
        tokens, images: per epoch, after level weights.
        levels: samples per epoch by level, after level weights; 0 without level.
        flops: of the whole stage, estimated as in ``training.flops``.
        seconds: estimated, at ASSUMED_UTILISATION of ``flops_per_s``.
        flops_per_s: peak of one device, from its data sheet if known, otherwise measured.
        measured: whether ``flops_per_s`` was measured.
        memory: estimate for one device.
    """

    facts: Facts
    steps: int
    micro_batches: int
    efficiency: float
    tokens: int
    images: int
    levels: dict[int, int]
    flops: float
    seconds: float
    flops_per_s: float
    measured: bool
    memory: Memory


def preview(config: StageConfig, ranks: int = 1) -> Preview:
    """Plan a stage for ``ranks`` devices; assumes that the LLM supports packing unless ``packing`` is off.

    Reads the data's texts but no images, and loads no weights.

    Raises:
        UserError: the data, the model or the settings cannot be used, as in ``train``.
    """
    processor = build_processor(config)
    source = open_data(config)
    config = with_levels_of(source, config)
    model_config = build_config(config)
    levels = model_config.num_levels if model_config.align_mode != "none" else 0
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(source, config, processor, levels, Path(folder) / "index.arrow")
        epoch = plan_epoch(config, index, 0, packed=config.packing != "off", world_size=ranks)
        steps = total_steps(config, len(epoch))
        taken = epoch.order
        tokens, images = int(index.lengths[taken].sum()), int(index.images[taken].sum())
        used = dict(enumerate(np.bincount(index.levels[taken], minlength=max(index.facts.levels) + 1).tolist()))
        facts = index.facts
    warn_of_levels(config, facts, levels)
    with torch.device("meta"):
        flops_of = Flops(AlignGPTForConditionalGeneration(model_config), trains_llm(config))
    labels = facts.supervised / facts.rows * len(taken)
    flops = flops_of(tokens, labels, images) * steps / len(epoch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device)
    rate = peak or measure_flops(device)
    return Preview(
        facts=facts,
        steps=steps,
        micro_batches=sum(len(epoch[number].ranks[0]) for number in range(len(epoch))),
        efficiency=epoch.efficiency(),
        tokens=tokens,
        images=images,
        levels={level: used[level] for level in sorted(facts.levels)},
        flops=flops,
        seconds=flops / (rate * ASSUMED_UTILISATION * ranks),
        flops_per_s=rate,
        measured=peak is None,
        memory=estimate_memory(model_config, config, ranks),
    )


def measure_flops(device: torch.device, seconds: float = 0.3) -> float:
    """Measure FLOP/s by multiplying square matrices: bfloat16 on GPUs, float32 on the CPU."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.ones(size, size, dtype=dtype, device=device)
    torch.mm(a, a)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        torch.mm(a, a)
        done += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return 2 * size**3 * done / (time.perf_counter() - started)
