"""Scoring: ours, the stock open_clip loop, and the ceiling (the encoder's forward alone), on the same real images.

    python -m benchmarks.score --save

Encoders have random weights: speed does not depend on them. Every round runs all variants in turn; rates and ratios
are medians over rounds. A run in which other processes took more than a tenth of the processor is repeated (--tries);
"others" is the largest share that they took of a run that counts. The first tar has only one pair: its pairs are also
scored exactly by `fast`, which is a cost per run, not per pair.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

import aligncurate
from aligncurate.encoders import load as encoders
from aligncurate.images.formats import EXTENSIONS
from aligncurate.io.tar import TarWriter
from benchmarks.common import Spread, publish, undisturbed

DATA = Path(__file__).resolve().parents[2] / "shared/data/coco"
# Pairs per run on the CPU, fewer for larger models: a run takes five to ten seconds, short enough to be undisturbed.
PAIRS = {"ViT-B-32": 96, "ViT-L-14": 12, "ViT-L-14-336": 6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=DATA, help="a folder of images, with captions.json if any")
    parser.add_argument("--models", nargs="+", default=list(PAIRS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--decode", nargs="+", default=["exact", "fast"], help="also gpu")
    parser.add_argument("--pairs", type=int, help="pairs per run; by default a few on a CPU, 20,000 on a GPU")
    parser.add_argument("--batch", type=int, help="by default 32 on a CPU, 256 on a GPU")
    parser.add_argument("--workers", type=int, help="of ours and of the stock DataLoader; by default one per core")
    parser.add_argument("--compile", action="store_true", help="ours with --compile")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=3, help="runs at most, if other processes disturb them")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    options.batch = options.batch or (256 if on_gpu else 32)
    options.workers = options.workers or torch.multiprocessing.cpu_count()
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("save", "models")
    }
    settings["images"] = options.images.name
    for model in options.models:
        count = options.pairs or (20_000 if on_gpu else PAIRS.get(model, 32))
        with TemporaryDirectory() as folder:
            rows = measure(model, count, options, Path(folder))
        title = f"{model}, pairs per second: median (least..most)"
        name = "-".join(["score", model, *(options.precisions if len(options.precisions) == 1 else [])])
        publish(name, title, rows, settings | {"pairs": count}, options.save)


def measure(model: str, count: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The table's rows of one model."""
    pairs = repeated(options.images, count)
    tars = [write_tar(folder / "first.tar", pairs[:1]), write_tar(folder / "others.tar", pairs[1:])]
    weights = random_weights(model, folder)
    variants: dict[tuple[str, str], Callable[[], float]] = {}
    for precision in options.precisions:
        for decode in options.decode:
            variants[f"ours, {decode}", precision] = ours(model, weights, precision, decode, tars, options, folder)
        variants["stock open_clip loop", precision] = stock(model, weights, precision, pairs, options)
        variants["ceiling", precision] = ceiling(model, weights, precision, pairs, options)
    rates: dict[tuple[str, str], list[float]] = {name: [] for name in variants}
    others = dict.fromkeys(variants, 0.0)
    for _ in range(options.rounds):
        for name, run in variants.items():
            seconds, share = undisturbed(run, tries=options.tries)
            rates[name].append(count / seconds)
            others[name] = max(others[name], share)
    weights.unlink()

    def over(name: tuple[str, str], other: tuple[str, str]) -> str | None:
        if name == other or other not in rates:
            return None
        # Per round, so that a slow spell of the machine affects both.
        return f"{statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True)):.2f}x"

    return [
        {
            "variant": name[0],
            "precision": name[1],
            "pairs/s": Spread.of(values),
            "of stock fp32": over(name, ("stock open_clip loop", "fp32")),
            "of stock bf16": over(name, ("stock open_clip loop", "bf16")),
            "of ceiling": over(name, ("ceiling", name[1])),
            "others": f"{others[name]:.0%}",
        }
        for name, values in rates.items()
    ]


def repeated(folder: Path, count: int) -> list[tuple[bytes, str]]:
    """`count` images of a folder, repeated as needed, each time with its next caption."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower().removeprefix(".") in EXTENSIONS)
    captions: dict[str, list[str]] = {}
    if (folder / "captions.json").is_file():
        found = json.loads((folder / "captions.json").read_text())
        names = {image["id"]: image["file_name"] for image in found["images"]}
        for line in found["annotations"]:
            captions.setdefault(names[line["image_id"]], []).append(line["caption"])
    known = [(f.read_bytes(), captions.get(f.name, [f.stem.replace("_", " ")])) for f in files]
    return [
        (data, texts[i // len(known) % len(texts)]) for i in range(count) for data, texts in (known[i % len(known)],)
    ]


def write_tar(path: Path, pairs: list[tuple[bytes, str]]) -> Path:
    with path.open("wb") as file:
        tar = TarWriter(file)
        for number, (data, caption) in enumerate(pairs):
            tar.add(f"{number:08d}.jpg", data)
            tar.add(f"{number:08d}.txt", caption.encode())
        tar.end()
    return path


def random_weights(model: str, folder: Path) -> Path:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = encoders.load(model, precision="fp32", device="cpu", random_weights=True).towers.model
    path = folder / f"{model}.safetensors"
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    return path


def ours(
    model: str, weights: Path, precision: Any, decode: Any, tars: list[Path], options: argparse.Namespace, folder: Path
) -> Callable[[], float]:
    """A whole `score`, without loading the model, whose cost does not depend on the number of pairs."""

    def run() -> float:
        with TemporaryDirectory(dir=folder) as out:
            return aligncurate.score(
                tars,
                out,
                model=model,
                pretrained=str(weights),
                precision=precision,
                decode=decode,
                compiled=options.compile,
                batch_size=options.batch,
                workers=options.workers,
                quiet=True,
            ).seconds

    return run


class _Images(torch.utils.data.Dataset[Any]):
    def __init__(self, pairs: list[tuple[bytes, str]], preprocess: Any, tokenizer: Any) -> None:
        self.pairs, self.preprocess, self.tokenizer = pairs, preprocess, tokenizer

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        data, caption = self.pairs[index]
        return self.preprocess(Image.open(io.BytesIO(data))), self.tokenizer([caption])[0]


def stock(
    model: str, weights: Path, precision: str, pairs: list[tuple[bytes, str]], options: argparse.Namespace
) -> Callable[[], float]:
    """The loop of open_clip's documentation: its preprocessing and tokenizer in a DataLoader, then both towers."""
    import open_clip

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run() -> float:
        net, _, preprocess = open_clip.create_model_and_transforms(
            model, pretrained=str(weights), precision=precision, device=device
        )
        net.eval()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        data = _Images(pairs, preprocess, open_clip.get_tokenizer(model))
        loader = torch.utils.data.DataLoader(
            data, options.batch, num_workers=options.workers, pin_memory=device == "cuda", prefetch_factor=2
        )
        scores = []
        with torch.no_grad():
            net.encode_text(torch.zeros(1, 77, dtype=torch.long, device=device))  # warm-up
            started = time.perf_counter()
            for images, texts in loader:
                image = net.encode_image(images.to(device, dtype))
                text = net.encode_text(texts.to(device))
                image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
                scores.append((image * text).sum(-1).float().cpu())
        torch.cat(scores)
        return time.perf_counter() - started

    return run


def ceiling(
    model: str, weights: Path, precision: Any, pairs: list[tuple[bytes, str]], options: argparse.Namespace
) -> Callable[[], float]:
    """Both towers alone, run as ours does, on tensors of the same shapes that are on the device already."""

    def run() -> float:
        encoder = encoders.load(model, str(weights), precision=precision, compiled=options.compile)
        encoder.towers.batch = options.batch
        window = min(8 * options.batch, max(options.batch, 1_024))
        texts = [
            encoder.tokenize([caption for _, caption in pairs[i : i + window]]) for i in range(0, len(pairs), window)
        ]
        size = encoder.preprocess.size or 224
        pixels = torch.randn(options.batch, 3, size, size).to(encoder.device)
        encoder.embed(pixels, texts[0][: options.batch])  # warm-up
        started = time.perf_counter()
        for tokens in texts:
            encoder.embed(pixels.repeat(-(-len(tokens) // len(pixels)), 1, 1, 1)[: len(tokens)], tokens)
        return time.perf_counter() - started

    return run


if __name__ == "__main__":
    main()
