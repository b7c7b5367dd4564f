"""Trains the built-in vision tower `tiny` (CLIP ViT) on drawn scenes: `python -m pipelines.tiny_models vision`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from aligncurate.demo.scenes import COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Scene, draw, make_scene
from pipelines.language_model import optimize

SIDE = 96  # pixels; a patch of 32 pixels is one of the nine places of a scene
CONFIG: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4, "num_attention_heads": 6,
    "image_size": SIDE, "patch_size": SIDE // 3,
}  # fmt: skip
# What the tower learns to classify at each place.
ATTRIBUTES = (SHAPES, tuple(COLOURS), tuple(TEXTURES), tuple(SIZES))
BATCH_SIZE = 128
TRAINING_SCENES, HELD_OUT_SCENES = 4, 9_003  # seeds of `make_scene`
HELD_OUT = 2_000  # scenes in the evaluation


def objects_of(scene: Scene) -> npt.NDArray[np.int64]:
    """The object at each place, int64 [9, 4]: shape, colour, texture and size as indices from 1; 0 if there is none."""
    objects_PA = np.zeros((len(PLACES), len(ATTRIBUTES)), dtype=np.int64)
    places = list(PLACES)
    for group in scene.groups:
        looks = (group.shape, group.colour, group.texture, group.size)
        numbers = [1 + names.index(look) for names, look in zip(ATTRIBUTES, looks, strict=True)]
        for cell in group.cells:
            objects_PA[places.index(cell)] = numbers
    return objects_PA


def train_tiny_vision(folder: Path, seed: int, steps: int = 500) -> dict[str, Any]:
    """Train the tower to classify the object at each place; write a Hugging Face folder and `metrics.json`.

    Args:
        folder: where to write.
        seed: for the weights.
        steps: optimizer steps, of 128 scenes each; each scene is seen once.

    Returns the content of `metrics.json`, with the accuracy for shape, colour, texture and size of objects in held-out
    scenes, by one linear layer over the patches of the tower's last but one layer.
    """
    torch.manual_seed(seed)
    tower = CLIPVisionModel(CLIPVisionConfig(**CONFIG))
    answers = [1 + len(names) for names in ATTRIBUTES]
    head = nn.Linear(CONFIG["hidden_size"], sum(answers))
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))

    def batch(scene_seed: int, start: int, count: int) -> tuple[Tensor, Tensor]:
        scenes = [make_scene(scene_seed, index) for index in range(start, start + count)]
        # Drawn at the size of the built-in data and then resized, as at inference.
        images = [np.array(draw(scene).resize((SIDE, SIDE), processor.resample)) for scene in scenes]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
        return (pixels - mean) / std, torch.from_numpy(np.stack([objects_of(scene) for scene in scenes]))

    def classify(pixels: Tensor) -> tuple[Tensor, ...]:
        # The layer that a new AlignGPT model uses by default.
        patches_BPC = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return tuple(head(patches_BPC).split(answers, dim=-1))

    def loss_of_step(step: int) -> Tensor:
        pixels, objects_BPA = batch(TRAINING_SCENES, step * BATCH_SIZE, BATCH_SIZE)
        losses = [
            cross_entropy(logits.flatten(0, 1), objects_BPA[..., k].flatten())
            for k, logits in enumerate(classify(pixels))
        ]
        return torch.stack(losses).sum()

    started = time.perf_counter()
    optimize([tower, head], loss_of_step, steps=steps, learning_rate=1.5e-3)
    tower.half().save_pretrained(folder)
    processor.save_pretrained(folder)

    tower.float()  # evaluate the half-precision weights, which are the ones that ship
    right, objects = torch.zeros(len(ATTRIBUTES)), 0
    with torch.inference_mode():
        for start in range(0, HELD_OUT, 500):
            pixels, objects_BPA = batch(HELD_OUT_SCENES, start, 500)
            occupied = objects_BPA[..., 0] > 0
            objects += int(occupied.sum())
            for k, logits in enumerate(classify(pixels)):
                right[k] += (logits.argmax(-1) == objects_BPA[..., k])[occupied].sum()
    names = ("shape", "colour", "texture", "size")
    metrics = {
        "seed": seed,
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "seconds": round(time.perf_counter() - started),
        "held_out_scenes": HELD_OUT,
        "named_rightly": {name: round(float(share), 4) for name, share in zip(names, right / objects, strict=True)},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics
