"""Decoders: what an image costs on one core, and how far `--decode fast` moves scores and levels from `exact`.

    python -m benchmarks.decode --save

Costs are processor time, not wall time, so that other processes hardly matter: the minimum of several rounds over all
images. Scores are those of the small encoder trained on photos that lies beside the images.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import open_clip
import simplejpeg
import torch
from PIL import Image

import aligncurate
from aligncurate.images.decode import decode, no_decoder_warnings, open_image
from aligncurate.images.preprocess import Preprocess
from benchmarks.common import publish
from benchmarks.score import DATA, repeated

SIZE = 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA.parent, help="a folder with coco, flickr8k and flickr-clip")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"rounds": options.rounds, "size": SIZE}
    with no_decoder_warnings():
        publish("decode", "processor time per image", costs(options.data, options.rounds), settings, options.save)
    publish("fast", "fast against exact", changes(options.data), {"encoder": "flickr-clip"}, options.save)


def costs(data: Path, rounds: int) -> list[dict[str, Any]]:
    photos = [image for image, _ in repeated(data / "coco", 142)]
    config = open_clip.transform.PreprocessCfg(size=SIZE)
    preprocess = Preprocess.of(open_clip.transform.image_transform_v2(config, is_train=False), vars(config))

    def turbo(data: bytes, edge: int) -> Any:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=edge, min_width=edge, min_factor=2)

    def draft(data: bytes) -> Any:
        image = Image.open(io.BytesIO(data))
        scale = SIZE / min(image.size)
        image.draft("RGB", (round(image.width * scale), round(image.height * scale)))
        return image.convert("RGB")

    def vision(data: bytes) -> Any:
        from torchvision.io import ImageReadMode, decode_jpeg

        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)

    ways: dict[str, Callable[[bytes], Any]] = {
        "stock: Pillow, open_clip's preprocessing": lambda d: preprocess.transform(Image.open(io.BytesIO(d))),
        "ours, exact": lambda d: decode(d, open_image(d)[0], [preprocess], "exact"),
        "ours, fast": lambda d: decode(d, open_image(d)[0], [preprocess], "fast"),
        "decoding only, Pillow, full size": lambda d: Image.open(io.BytesIO(d)).convert("RGB"),
        "decoding only, torchvision, full size": vision,
        "decoding only, simplejpeg, full size": lambda d: simplejpeg.decode_jpeg(d, "RGB"),
        "decoding only, Pillow, reduced": draft,
        "decoding only, simplejpeg, reduced": lambda d: turbo(d, SIZE),
    }
    rows = []
    large = [enlarged(photo) for photo in photos[:24]]
    for name, way in ways.items():
        row: dict[str, Any] = {"way": name}
        for column, files in (("coco, 640 px (ms)", photos), ("enlarged, 3000 px (ms)", large)):
            row[column] = least(way, files, rounds)
        rows.append(row)
    return rows


def enlarged(data: bytes) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    buffer = io.BytesIO()
    image.resize((3_000, round(3_000 * image.height / image.width))).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def least(way: Callable[[bytes], Any], files: list[bytes], rounds: int) -> float:
    """Milliseconds of processor time per file."""
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        for data in files:
            way(data)
        taken.append(time.process_time() - started)
    return 1_000 * min(taken) / len(files)


def changes(data: Path, levels: int = 8) -> list[dict[str, Any]]:
    encoder = {
        n: data / f"flickr-clip/flickr-clip.{e}" for n, e in (("model_config", "json"), ("pretrained", "safetensors"))
    }
    rows = []
    with TemporaryDirectory() as folder:
        for name, source in (("coco", data / "coco"), ("flickr8k dev", data / "flickr8k/dev-00000.tar")):
            found = {}
            for mode in ("exact", "fast"):
                scored = aligncurate.score(
                    source, f"{folder}/{name}-{mode}", **encoder, decode=mode, quiet=True
                ).dataset  # type: ignore[arg-type]
                levelled = aligncurate.bucket(scored, f"{folder}/{name}-{mode}-levels", levels=levels, quiet=True)  # type: ignore[arg-type]
                found[mode] = levelled.scan().select("score", "level").collect().drop_nulls()
            exact, fast = found["exact"], found["fast"]
            change = np.abs(exact["score"].to_numpy() - fast["score"].to_numpy())
            ranks = [np.argsort(np.argsort(frame["score"].to_numpy())) for frame in (exact, fast)]
            moved = np.abs(exact["level"].to_numpy() - fast["level"].to_numpy())
            rows.append(
                {
                    "data": name,
                    "pairs": len(change),
                    "mean change": float(change.mean()),
                    "99th percentile": float(np.quantile(change, 0.99)),
                    "largest": float(change.max()),
                    f"another level of {levels}": f"{(moved > 0).mean():.1%}",
                    "two levels or more": f"{(moved > 1).mean():.1%}",
                    "rank correlation": f"{np.corrcoef(*ranks)[0, 1]:.5f}",
                }
            )
    return rows


if __name__ == "__main__":
    main()
