"""Trains the built-in image-text encoder `tiny` on drawn scenes: `python -m pipelines.tiny_models encoder`."""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from aligncurate.demo.scenes import KINDS, PLACES, Kind, describe, draw, make_scene, pairs
from pipelines.tiny_vision import ATTRIBUTES, objects_of

# Letters at the end of a name give its shape: N scenes, B scenes of a batch, V caption variants of a scene,
# K captions of a variant (one for each of TAUGHT), T tokens, E embedding, P places, A attributes.

NAME = "tiny"
IMAGE_SIZE = 64
CONTEXT_LENGTH = 32
ENCODER_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 16},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
TRAINING_SCENES, HELD_OUT_SCENES = 1, 2  # seeds of `make_scene`
TAUGHT: tuple[Kind, ...] = ("right", "one_detail_wrong", "one_object_wrong")
VARIANTS = 4
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 3e-3


# ---- the pool of training scenes -------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Scenes drawn and captions tokenized before training, so that no step waits for Pillow.

    Attributes:
        images: uint8 [N, 3, 64, 64].
        tokens_NVKT: int32.
        objects_NPA: uint8, from `tiny_vision.objects_of`.
    """

    images: Tensor
    tokens_NVKT: Tensor
    objects_NPA: Tensor

    def __len__(self) -> int:
        return len(self.images)


def draw_pool(count: int, processes: int) -> Pool:
    """The first `count` training scenes."""
    images = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    tokens_NVKT = torch.empty(count, VARIANTS, len(TAUGHT), CONTEXT_LENGTH, dtype=torch.int32)
    objects_NPA = torch.empty(count, len(PLACES), len(ATTRIBUTES), dtype=torch.uint8)
    with multiprocessing.get_context("spawn").Pool(processes) as workers:
        for index, drawn in enumerate(workers.imap(_draw_one, range(count), chunksize=200)):
            images[index], tokens_NVKT[index], objects_NPA[index] = map(torch.from_numpy, drawn)
    return Pool(images, tokens_NVKT, objects_NPA)


@cache
def _tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer(context_length=CONTEXT_LENGTH)


def _draw_one(index: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    scene = make_scene(TRAINING_SCENES, index)
    # The resize of open_clip's preprocessing; the rest of it is cheap and done per batch.
    image = np.array(draw(scene).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    captions = [describe(scene, kind, variant) for variant in range(VARIANTS) for kind in TAUGHT]
    tokens = _tokenizer()(captions).view(VARIANTS, len(TAUGHT), CONTEXT_LENGTH)
    return image.transpose(2, 0, 1), tokens.to(torch.int32).numpy(), objects_of(scene).astype(np.uint8)


# ---- losses ----------------------------------------------------------------------------------------


def contrastive_loss(images_BE: Tensor, texts_BKE: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss (Radford et al. 2021, figure 3), with wrong captions of each image as extra negatives.

    Embeddings are unit vectors, and the first of the K captions is right. Each image is matched to its right caption
    among all captions of the batch, and each right caption to its image.
    """
    right_BE = texts_BKE[:, 0]
    every_caption = torch.cat([right_BE, texts_BKE[:, 1:].flatten(0, 1)])
    target_B = torch.arange(len(images_BE))
    to_text = functional.cross_entropy(scale * images_BE @ every_caption.T, target_B)
    to_image = functional.cross_entropy(scale * right_BE @ images_BE.T, target_B)
    return (to_text + to_image) / 2


def ranking_loss(images_BE: Tensor, texts_BKE: Tensor, scale: Tensor) -> Tensor:
    """Makes every right pair of the batch score above every wrong caption of every image.

    Levels compare scores across images, but the contrastive loss leaves the scores of an image free to be high or low
    as a whole. This is the logistic surrogate of 1 - AUC.
    """
    scores_BK = torch.einsum("be,bke->bk", images_BE, texts_BKE)
    lead = scores_BK[:, 0, None] - scores_BK[:, 1:].flatten()
    return functional.softplus(-scale * lead).mean()


class Guide(nn.Module):
    """Auxiliary head that classifies the object at each place from the last feature map; dropped after training.

    Few captions mention textures and places, so the tower learns these slowly from captions alone; with this loss it
    learns them within a few hundred steps.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.answers = [1 + len(names) for names in ATTRIBUTES]
        self.head = nn.Linear(features, len(PLACES) * sum(self.answers))

    def forward(self, feature_map: Tensor, objects_BPA: Tensor) -> Tensor:
        """Scalar loss for feature maps [B, C, H, W]: cross-entropy, summed over the attributes."""
        logits = self.head(feature_map.flatten(1)).view(len(feature_map), len(PLACES), -1)
        losses = [
            functional.cross_entropy(answer.flatten(0, 1), objects_BPA[..., k].flatten())
            for k, answer in enumerate(logits.split(self.answers, dim=-1))
        ]
        return torch.stack(losses).sum()


# ---- training --------------------------------------------------------------------------------------


def train_tiny_encoder(folder: Path, seed: int, steps: int = 2_600, scenes: int = 30_000) -> dict[str, Any]:
    """Train the `tiny` open_clip model; write `tiny.json`, `tiny.safetensors` (fp16) and `tiny.metrics.json`.

    Args:
        folder: where to write the three files.
        seed: for the weights and the order of batches.
        steps: optimizer steps, of 128 scenes each.
        scenes: number of scenes to train on, over as many epochs as the steps need.

    Returns the content of `tiny.metrics.json`. The same arguments give the same weights on the same machine with the
    same number of threads.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    pool = draw_pool(scenes, processes=multiprocessing.cpu_count())
    print(f"drew {len(pool)} scenes in {time.perf_counter() - started:.0f} s", flush=True)

    config = folder / f"{NAME}.json"
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(ENCODER_CONFIG, indent=2) + "\n")
    open_clip.add_model_config(config)
    model = open_clip.create_model(NAME).to(memory_format=torch.channels_last)
    guide = Guide(features=ENCODER_CONFIG["vision_cfg"]["width"] * 32 * (IMAGE_SIZE // 32) ** 2)
    parameters = [*model.named_parameters(), *guide.named_parameters()]
    matrices = [weight for name, weight in parameters if weight.ndim > 1 and "embedding" not in name]
    others = [weight for name, weight in parameters if weight.ndim <= 1 or "embedding" in name]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.1)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) * 255
        for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )

    running = torch.zeros(3)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(pool))
        rows, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        images = (pool.images[rows].float() - mean) / std
        tokens_BKT = pool.tokens_NVKT[rows, torch.randint(VARIANTS, (BATCH_SIZE,))]

        seen = model.visual.forward_intermediates(images.contiguous(memory_format=torch.channels_last), indices=1)
        images_BE = functional.normalize(seen["image_features"], dim=-1)
        texts_BKE = model.encode_text(tokens_BKT.flatten(0, 1), normalize=True).unflatten(0, (BATCH_SIZE, -1))
        scale = model.logit_scale.exp()
        losses = torch.stack(
            [
                contrastive_loss(images_BE, texts_BKE, scale),
                ranking_loss(images_BE, texts_BKE, scale),
                guide(seen["image_intermediates"][-1], pool.objects_NPA[rows].long()),
            ]
        )
        optimizer.zero_grad()
        torch.autograd.backward(losses.sum())
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # as CLIP does
        running += losses.detach()
        if step % 100 == 0 or step == steps:
            contrastive, ranking, naming = (running / ((step - 1) % 100 + 1)).tolist()
            running.zero_()
            print(
                f"step {step}/{steps} {time.perf_counter() - started:.0f} s contrastive {contrastive:.3f} "
                f"ranking {ranking:.3f} naming {naming:.3f} scale {scale.item():.1f}",
                flush=True,
            )

    weights = {
        name: (weight.half() if weight.is_floating_point() else weight).contiguous()
        for name, weight in model.state_dict().items()
    }
    (folder / f"{NAME}.safetensors").write_bytes(save(weights))
    metrics = {
        "seed": seed,
        "steps": steps,
        "scenes": scenes,
        "batch_size": BATCH_SIZE,
        "seconds": round(time.perf_counter() - started),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "held_out": held_out_figures(folder, count=8000),
    }
    (folder / f"{NAME}.metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


# ---- figures ---------------------------------------------------------------------------------------


def held_out_figures(folder: Path, count: int) -> dict[str, Any]:
    """Evaluates the stored weights on `count` pairs of scenes that were not trained on.

    `auc` is the share of (right, wrong) score pairs in which the right caption scores higher. For
    `auc_with_other_images` every caption is paired with another image: it is 0.5 unless the wording alone tells right
    captions from wrong ones.
    """
    open_clip.add_model_config(folder / f"{NAME}.json")
    weights = str(folder / f"{NAME}.safetensors")
    model, _, preprocess = open_clip.create_model_and_transforms(NAME, pretrained=weights)
    model.eval()
    tokenizer = open_clip.get_tokenizer(NAME)
    images, texts, kinds = [], [], []
    with torch.inference_mode():
        held_out = pairs(count, HELD_OUT_SCENES)
        while batch := [pair for _, pair in zip(range(250), held_out, strict=False)]:
            pixels = torch.stack([preprocess(pair.image) for pair in batch])
            images.append(model.encode_image(pixels, normalize=True))
            texts.append(model.encode_text(tokenizer([pair.caption for pair in batch]), normalize=True))
            kinds += [pair.kind for pair in batch]
    images_NE, texts_NE = torch.cat(images), torch.cat(texts)
    own = _by_kind((images_NE * texts_NE).sum(dim=1), kinds)
    others = _by_kind((images_NE.roll(1, dims=0) * texts_NE).sum(dim=1), kinds)
    wrong = KINDS[1:]
    return {
        "pairs": count,
        "auc": {kind: round(auc(own["right"], own[kind]), 4) for kind in wrong},
        "auc_with_other_images": {kind: round(auc(others["right"], others[kind]), 4) for kind in wrong},
        "mean_score": {kind: round(float(own[kind].mean()), 4) for kind in KINDS},
        "score_spread": {kind: round(float(own[kind].std()), 4) for kind in KINDS},
    }


def _by_kind(scores: Tensor, kinds: list[Kind]) -> dict[Kind, npt.NDArray[np.float32]]:
    return {kind: scores[[k == kind for k in kinds]].numpy() for kind in KINDS}


def auc(higher: npt.NDArray[np.float32], lower: npt.NDArray[np.float32]) -> float:
    """Area under the ROC curve: the share of pairs (one of each) in which the first is greater; ties count half."""
    ordered = np.sort(lower)
    below = np.searchsorted(ordered, higher, side="left")
    not_above = np.searchsorted(ordered, higher, side="right")
    return float((below + not_above).sum() / (2 * len(higher) * len(lower)))
