"""Feeding the encoder: how many pairs per second reach an encoder that costs nothing, and what each stage takes.

    python -m benchmarks.feed --save

Three tables. Rates: `score`, from tars to committed parts, beside torch's DataLoader with webdataset, open_clip's own
preprocessing and tokenizer, as open_clip trains with. Both run twice per measurement, on few and on many pairs, so that
starting workers is not counted: the rate is that of the pairs between. Stages: CPU time per pair of each step alone, in
one thread. Cores: how many CPU cores keep one GPU busy, computed from both.

Photos are COCO's; for the smaller sizes their short edge is reduced, at JPEG quality 95, as img2dataset does by
default. Tars are written by webdataset, with a text and a JSON per image.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import open_clip
import torch
import webdataset as wds
from PIL import Image

import aligncurate
from aligncurate.dataset.part import PartWriter
from aligncurate.dataset.record import Pair, schema, to_table
from aligncurate.encoders import load as encoders
from aligncurate.encoders.tokenizer import fast_tokenizer
from aligncurate.encoders.towers import Towers
from aligncurate.images.decode import decode, no_decoder_warnings, open_image
from aligncurate.images.preprocess import Preprocess
from aligncurate.scoring import run as scoring
from aligncurate.sources.detect import open_source
from benchmarks.common import Spread, cpu_seconds, publish, undisturbed
from benchmarks.score import DATA, repeated

MODEL, SIZE, WIDTH = "ViT-B-32", 224, 512
PAIRS = {160: 2_400, 256: 2_000, 640: 500}  # of the shorter run; the longer one has three times as many
TARS = 4  # of the shorter run
MANY = 3  # times the pairs of the shorter run


@dataclass(frozen=True)
class Demand:
    """What an encoder asks of the CPU.

    Attributes:
        pairs: pairs per second of one GPU. Not measured: 12,000 and 2,400 are assumptions, the others are scaled from
            2,400 by the FLOPs of image and text in open_clip's docs/model_profile.csv (`gflops`, of one pair).
        size: edge of its input, in pixels.
        resize_mode: open_clip's name of how images become square; `fast` cannot do `squash`.
    """

    pairs: float
    size: int = 224
    resize_mode: str = "shortest"


def scaled(gflops: float) -> float:
    """Pairs per second of an encoder of `gflops` per pair, if it computes at the speed assumed for ViT-L/14."""
    return 2_400 * 175.33 / gflops


ENCODERS = {
    "ViT-B/32": Demand(12_000),
    "ViT-B/16": Demand(scaled(41.09)),
    "ViT-L/14": Demand(2_400),
    "ViT-L/14-336": Demand(scaled(395.22), 336),
    "ViT-H/14": Demand(scaled(381.68)),
    "SigLIP SO400M/14": Demand(scaled(233.54), 224, "squash"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=DATA, help="a folder of images, with captions.json if any")
    parser.add_argument("--edges", type=int, nargs="+", default=list(PAIRS), help="sizes of the photos, in pixels")
    parser.add_argument("--decode", nargs="+", default=["exact", "fast"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="of ours and of the DataLoader")
    parser.add_argument("--pairs", type=int, help="pairs of the shorter run; by default fewer for larger photos")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=3, help="runs at most, if other processes disturb them")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the encoder costs nothing, and a worker shall use one core
    settings = {k: v for k, v in vars(options).items() if k not in ("save", "images")} | {"images": options.images.name}
    settings |= {"size": SIZE, "model": MODEL}
    rates: list[dict[str, Any]] = []
    stages: list[dict[str, Any]] = []
    with TemporaryDirectory() as name, no_decoder_warnings():
        for edge in options.edges:
            folder = Path(name) / str(edge)
            few = options.pairs or PAIRS.get(edge, 240)
            tars = write_tars(folder, [(at_edge(d, edge), t) for d, t in repeated(options.images, few)], few * MANY)
            rates += measure_rates(edge, few, tars, options)
            stages += measure_stages(edge, tars[0], options, folder)
    publish("feed", "pairs per second with a free encoder: median (least..most)", rates, settings, options.save)
    publish("feed-stages", "CPU time per pair in one thread, µs", stages, settings, options.save)
    cores = cores_needed(rates, stages)
    publish("feed-cores", "CPU cores needed per GPU (GPU rates are assumed)", cores, settings, options.save)


def at_edge(data: bytes, edge: int) -> bytes:
    """A photo with its short edge at `edge` pixels; one of 640 pixels and more stays as it is."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = edge / min(image.size)
    if edge >= 640 or scale >= 1:
        return data
    buffer = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=95
    )
    return buffer.getvalue()


def write_tars(folder: Path, pairs: Sequence[tuple[bytes, str]], count: int) -> list[Path]:
    """Tars of `count` pairs, which repeat `pairs`: TARS of them hold each of these once."""
    folder.mkdir(parents=True)
    each = -(-len(pairs) // TARS)
    tars = [folder / f"{number:05d}.tar" for number in range(-(-count // each))]
    for number, path in enumerate(tars):
        with wds.TarWriter(str(path)) as tar:
            for i in range(number * each, min(count, (number + 1) * each)):
                data, caption = pairs[i % len(pairs)]
                key = f"{number:05d}{i % each:04d}"
                meta = {
                    "caption": caption, "url": f"https://example.com/{key}.jpg", "key": key, "status": "success",
                    "error_message": None, "width": 640, "height": 480, "original_width": 640, "original_height": 480,
                    "exif": "{}", "sha256": hashlib.sha256(data).hexdigest(),
                }  # fmt: skip
                tar.write({"__key__": key, "jpg": data, "txt": caption, "json": json.dumps(meta, indent=4)})
    return tars


# --- rates -----------------------------------------------------------------------------------------------------------


class _NoModel:
    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), WIDTH)

    encode_text = encode_image


class FreeTowers(Towers):
    """Towers whose embeddings are zeros and cost nothing."""

    def embed(self, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(pixels), WIDTH), torch.zeros(len(tokens), WIDTH)


def preprocess_of(size: int = SIZE, resize_mode: str = "shortest") -> Preprocess:
    config = open_clip.transform.PreprocessCfg(size=size, resize_mode=resize_mode)
    return Preprocess.of(open_clip.transform.image_transform_v2(config, is_train=False), vars(config))


def free_encoder() -> encoders.Encoder:
    """ViT-B/32's tokenizer and preprocessing, and no model."""
    preprocess = preprocess_of()
    towers = FreeTowers(_NoModel(), preprocess.normalize, torch.device("cpu"), torch.float32)
    tokenizer = open_clip.get_tokenizer(MODEL)
    identity = {
        "model": "free", "pretrained": None, "weights_sha256": None, "config": None,
        "tokenizer": type(tokenizer).__name__, "context_length": tokenizer.context_length, "precision": "fp32",
        "preprocess": {"size": SIZE, "mean": preprocess.mean, "std": preprocess.std, "interpolation": "bicubic",
                       "resize_mode": "shortest"},
        "compiled": False,
    }  # fmt: skip
    return encoders.Encoder(fast_tokenizer(tokenizer), preprocess, towers, identity)


def ours(tars: Sequence[Path], mode: Any, workers: int, batch: int) -> float:
    """Seconds of a whole `score` with a free encoder."""
    with (
        TemporaryDirectory() as out,
        mock.patch.object(encoders, "load_all", lambda *_, **__: {"score": free_encoder()}),
        mock.patch.object(scoring, "_MANY_ROWS", 0),  # worker processes, as in a long run
    ):
        run = aligncurate.score(
            list(tars), out, model=MODEL, decode=mode, workers=workers, batch_size=batch, device="cpu", quiet=True
        )
    assert run.dataset is not None and not run.dataset.parts[0].failed
    return run.seconds


def loader(tars: Sequence[Path], workers: int, batch: int) -> float:
    """Seconds of the loop that open_clip trains with, without training."""
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=SIZE), is_train=False)
    tokenizer = open_clip.get_tokenizer(MODEL)
    pipeline = wds.DataPipeline(
        wds.SimpleShardList([str(tar) for tar in tars]),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(batch, partial=True),
    )
    started = time.perf_counter()
    for _ in torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers):
        pass
    return time.perf_counter() - started


def measure_rates(edge: int, few: int, tars: Sequence[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The table's rows for photos of one size."""
    variants: dict[tuple[str, int], Callable[[Sequence[Path]], float]] = {}
    for workers in options.workers:
        for mode in options.decode:
            variants[f"ours, {mode}", workers] = partial(ours, mode=mode, workers=workers, batch=options.batch)
        variants["DataLoader, open_clip", workers] = partial(loader, workers=workers, batch=options.batch)
    between = (MANY - 1) * few
    rates: dict[tuple[str, int], list[float]] = {name: [] for name in variants}
    cpu: dict[tuple[str, int], list[float]] = {name: [] for name in variants}
    others = dict.fromkeys(variants, 0.0)
    for variant in variants.values():
        variant(tars[:1])  # warm-up
    for _ in range(options.rounds):
        for name, variant in variants.items():
            used: dict[float, float] = {}

            def run(variant: Any = variant, used: dict[float, float] = used) -> float:
                before = cpu_seconds()
                first, middle = variant(tars[:TARS]), cpu_seconds()
                seconds = variant(tars) - first
                used[seconds] = cpu_seconds() - middle - (middle - before)
                return float(seconds)

            seconds, share = undisturbed(run, tries=options.tries)
            rates[name].append(between / max(seconds, 1e-9))
            cpu[name].append(1e6 * used[seconds] / between)
            others[name] = max(others[name], share)
    few_workers = min(options.workers)

    def over(name: tuple[str, int], other: tuple[str, int]) -> str | None:
        if name == other or other not in rates:
            return None
        return f"{statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True)):.2f}x"

    return [
        {
            "photos": edge,
            "variant": name[0],
            "workers": name[1],
            "pairs/s": Spread.of(values),
            "CPU µs per pair": Spread.of(cpu[name]),
            f"of {few_workers} worker": over(name, (name[0], few_workers)),
            "of DataLoader": over(name, ("DataLoader, open_clip", name[1])),
            "others": f"{others[name]:.0%}",
        }
        for name, values in rates.items()
    ]


# --- stages ----------------------------------------------------------------------------------------------------------


def measure_stages(edge: int, tar: Path, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """CPU time of each stage, in µs per pair: the least of several rounds."""
    source = open_source(str(tar))
    encoder = free_encoder()

    def read() -> list[tuple[Pair, bytes]]:
        return [(pair, pair.load()) for pair in source.read(source.shards[0]) if pair.load is not None]

    found = read()
    files = [data for _, data in found]
    texts = [pair.caption or "" for pair, _ in found]
    for pair, data in found:
        pair.sha256, pair.width, pair.height, pair.score = hashlib.sha256(data).digest(), 640, 480, 0.25
    pairs = [pair for pair, _ in found]
    columns = schema(source.extras)
    table = to_table(pairs, columns)
    pixels = np.zeros((3, SIZE, SIZE), np.uint8)
    batch = np.empty((64, *pixels.shape), np.uint8)

    def write() -> None:
        with TemporaryDirectory(dir=folder) as out:
            (Path(out) / "data").mkdir()
            (Path(out) / ".receipts").mkdir()
            with PartWriter(Path(out), 0, columns) as part:
                part.write(table)

    def gather() -> None:
        for row in range(len(files)):
            batch[row % len(batch)] = pixels

    def decoding(preprocess: Preprocess, mode: Any) -> Callable[[], None]:
        def run() -> None:
            for data, image in zip(files, opened(files), strict=True):
                decode(data, image, [preprocess], mode)

        return run

    works: dict[str, Callable[[], object]] = {
        "tar, Pair and image bytes": read,
        "sha256": lambda: [hashlib.sha256(data).digest() for data in files],
        "open": lambda: list(opened(files)),
        "tokenize": lambda: encoder.tokenize(texts),
        "pixels to a batch": gather,
        "rows to Arrow": lambda: to_table(pairs, columns),
        "Parquet and receipt": write,
    }
    for size, resize_mode in sorted({(demand.size, demand.resize_mode) for demand in ENCODERS.values()}):
        preprocess = preprocess_of(size, resize_mode)
        for mode in options.decode:
            works[_decoding(size, resize_mode, mode)] = decoding(preprocess, mode)
    taken: dict[str, float] = {}
    for name, work in works.items():
        seconds = []
        for _ in range(options.rounds):
            started = time.process_time()
            work()
            seconds.append(time.process_time() - started)
        taken[name] = 1e6 * min(seconds) / len(files)
    for name in taken:
        if name.startswith("decode"):  # which opens the image again: it can be decoded only once
            taken[name] -= taken["open"]
    return [{"photos": edge, "stage": name, "µs": round(value, 1)} for name, value in taken.items()]


def opened(files: Sequence[bytes]) -> Iterator[Any]:
    return (open_image(data)[0] for data in files)


def _decoding(size: int, resize_mode: str, mode: str) -> str:
    return f"decode and resize, {mode}, to {size}{'' if resize_mode == 'shortest' else f' ({resize_mode})'}"


# --- cores -----------------------------------------------------------------------------------------------------------


def cores_needed(rates: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """CPU cores that feed one GPU, for each encoder, size of the photos and way to decode.

    CPU time per pair is that of `score` with the most workers; for an encoder with another input, what decoding to it
    takes more or less is added.
    """
    steps = {(row["photos"], row["stage"]): row["µs"] for row in stages}
    spent: dict[tuple[int, str], float] = {}
    for row in rates:  # rows with more workers come later
        variant, _, mode = row["variant"].partition(", ")
        if variant == "ours":
            spent[row["photos"], mode] = row["CPU µs per pair"].median
    found = []
    for encoder, demand in ENCODERS.items():
        row = {"encoder": encoder, "input": demand.size, "assumed pairs/s": round(demand.pairs)}
        for (edge, mode), cpu in spent.items():
            own = steps[edge, _decoding(demand.size, demand.resize_mode, mode)]
            each = cpu + own - steps[edge, _decoding(SIZE, "shortest", mode)]
            row[f"{edge} px, {mode}"] = round(demand.pairs * each / 1e6, 1)
        found.append(row)
    return found


if __name__ == "__main__":
    main()
