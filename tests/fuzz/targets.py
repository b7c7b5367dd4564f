"""The kinds of inputs that are damaged, and what must hold for each.

A target makes its good files once in a folder. A case copies what it damages, runs the product, and raises Finding
when a rule is broken. Errors of the product's own tree are fine; any other exception is a finding too.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import aligncurate
from aligncurate.errors import AlignCurateError, ImageError
from aligncurate.images.decode import load_rgb
from aligncurate.images.formats import extension
from tests.fuzz.mutations import damage
from tests.support.inputs import encoded, jpeg, pairs, picture, tar_bytes

ROWS = 12


class Finding(Exception):
    """The product broke a rule."""


class Target(ABC):
    """A kind of input; see the module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def run(self, rng: random.Random, work: Path) -> str:
        """One case in the empty folder `work`; what was damaged, in words."""


def ingest(source: Path, out: Path, **options: Any) -> pl.DataFrame | None:
    """Rows of an ingest; None when the product refused the source with a sentence."""
    try:
        run = aligncurate.ingest(str(source), out, quiet=True, **options)
    except AlignCurateError as error:
        check_sentence(str(error))
        return None
    for failure in run.failures:
        check_sentence(failure.error)
    if run.dataset is None:
        return None
    if not run.dataset.files:
        return pl.DataFrame({"key": [], "status": [], "error": [], "caption": []})
    frame = run.dataset.scan().collect()
    for row in frame.iter_rows(named=True):
        if row["error"]:
            check_sentence(row["error"])
    return frame


def check_sentence(text: str) -> None:
    """A message is short, on one line, and not a traceback."""
    if "Traceback" in text or "\n" in text.strip() or len(text) > 2_000:
        raise Finding(f"not a sentence: {text[:300]!r}")


class Images(Target):
    """Image files of all formats that are read: a picture, or a status; never another exception."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        rgb = picture(1, width=64, height=48)
        frames = [picture(seed) for seed in range(3)]
        self.good = {
            "jpg": encoded(rgb),
            "progressive": encoded(rgb, "JPEG", progressive=True),
            "cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
            "png": encoded(rgb, "PNG"),
            "palette": encoded(rgb.convert("P"), "PNG"),
            "webp": encoded(rgb, "WEBP"),
            "animated": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
            "gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            "bmp": encoded(rgb, "BMP"),
            "tif": encoded(rgb, "TIFF", compression="tiff_lzw"),
            "jp2": encoded(rgb, "JPEG2000"),
            "avif": encoded(rgb, "AVIF"),
            "ico": encoded(rgb.resize((32, 32)), "ICO"),
            "ppm": encoded(rgb, "PPM"),
            "tga": encoded(rgb, "TGA"),
            "mpo": encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        }
        exif = Image.Exif()
        exif[0x0112] = 6
        self.good["rotated"] = encoded(rgb, "JPEG", exif=exif.tobytes())

    def run(self, rng: random.Random, work: Path) -> str:
        done, files = [], []
        for number in range(ROWS):
            kind = rng.choice(list(self.good))
            hurt = damage(self.good[kind], rng)
            done.append(f"{kind}: {hurt.what}")
            extension(hurt.data)
            try:
                load_rgb(hurt.data)
            except ImageError as error:
                check_sentence(str(error))
            files += [(f"s{number}.jpg", hurt.data), (f"s{number}.txt", b"text")]
        (work / "x.tar").write_bytes(tar_bytes(files))
        frame = ingest(work / "x.tar", work / "out")
        if frame is None or len(frame) != ROWS:
            raise Finding(f"{'no' if frame is None else len(frame)} rows of {ROWS}")
        return "; ".join(done)


class Tar(Target):
    """A tar: samples before the damage are kept; later ones have a status, or the shard fails."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        samples = pairs(ROWS)
        members = []
        for key, files in samples.items():
            meta = json.dumps({"url": f"https://example.org/{key}", "clip": 0.25, "n": 3}).encode()
            members += [(f"{key}.jpg", files["jpg"]), (f"{key}.json", meta), (f"{key}.txt", files["txt"])]
        self.good = tar_bytes(members)
        self.ends = {}  # where each sample ends
        for number, key in enumerate(samples):
            self.ends[key] = _end(members[: 3 * number + 3])

    def run(self, rng: random.Random, work: Path) -> str:
        hurt = damage(self.good, rng, text=rng.random() < 0.3)
        (work / "x.tar").write_bytes(hurt.data)
        frame = ingest(work / "x.tar", work / "out")
        if frame is not None:
            ok = set(frame.filter(pl.col("status") == "ok")["key"])
            lost = [key for key, end in self.ends.items() if end <= hurt.first and key not in ok]
            if lost:
                raise Finding(f"{hurt.what}: samples before the damage were lost: {lost}")
        return hurt.what


def _end(members: list[tuple[str, bytes]]) -> int:
    return sum(512 + -(-len(data) // 512) * 512 for _, data in members)


class Rows(Target):
    """Files of rows, one row per line: rows on other lines are kept, or the file is refused."""

    def __init__(self, folder: Path, ending: str) -> None:
        super().__init__(folder)
        (folder / "images").mkdir(parents=True)
        rows = []
        for number in range(ROWS):
            (folder / "images" / f"{number}.jpg").write_bytes(jpeg(number))
            rows.append(
                {"id": f"k{number}", "image": f"images/{number}.jpg", "caption": f"caption, {number}", "n": number}
            )
        self.ending = ending
        if ending == "csv":
            out = io.StringIO()
            writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            self.good = out.getvalue().encode()
        elif ending == "jsonl":
            self.good = "".join(json.dumps(row) + "\n" for row in rows).encode()
        else:
            turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
            self.good = json.dumps([{**row, "conversations": turns} for row in rows], indent=1).encode()

    def run(self, rng: random.Random, work: Path) -> str:
        hurt = damage(self.good, rng, text=True)
        shutil.copytree(self.folder / "images", work / "images", copy_function=os.link)  # links out of it are refused
        (work / f"x.{self.ending}").write_bytes(hurt.data)
        frame = ingest(work / f"x.{self.ending}", work / "out")
        if frame is not None and self.ending == "jsonl":
            # The captions of lines that are still there, word for word; their keys may occur twice now.
            lines = set(hurt.data.split(b"\n"))
            whole = {json.loads(line)["caption"] for line in self.good.splitlines() if line in lines}
            lost = whole - set(frame.filter(pl.col("status") == "ok")["caption"])
            if lost:
                raise Finding(f"{hurt.what}: rows of whole lines were lost: {sorted(lost)}")
        return hurt.what


class Parquet(Target):
    """A Parquet file with images."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        table = pa.table(
            {
                "key": [f"k{n}" for n in range(ROWS)],
                "image": pa.array([{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(ROWS)]),
                "text": [f"caption {n}" for n in range(ROWS)],
                "clip": np.linspace(0, 1, ROWS),
                "tags": [["a", "b"]] * ROWS,
            }
        )
        out = io.BytesIO()
        pq.write_table(table, out, row_group_size=5, write_page_checksum=True)
        self.good = out.getvalue()

    def run(self, rng: random.Random, work: Path) -> str:
        # Half of the damage goes into the last part of the file, its description.
        split = len(self.good) - 3_000 if rng.random() < 0.5 else 0
        hurt = damage(self.good[split:], rng)
        (work / "x.parquet").write_bytes(self.good[:split] + hurt.data)
        ingest(work / "x.parquet", work / "out")
        return f"after {split}: {hurt.what}"


class Dataset(Target):
    """Any file of a finished dataset: every verb refuses it, or gives what it gives for the whole one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "x.tar").write_bytes(tar_bytes((f"{k}.{e}", d) for k, f in pairs(ROWS).items() for e, d in f.items()))
        aligncurate.score(str(folder / "x.tar"), folder / "scored", model="tiny", device="cpu", quiet=True)
        aligncurate.bucket(folder / "scored", folder / "good", levels=3, quiet=True)
        self.expected = self._verbs(folder / "good", folder / "expected")

    def run(self, rng: random.Random, work: Path) -> str:
        shutil.copytree(self.folder / "good", work / "data")
        files = sorted(path for path in (work / "data").rglob("*") if path.is_file() and path.name != ".lock")
        file = rng.choice(files)
        hurt = damage(file.read_bytes(), rng, text=file.suffix == ".json")
        file.write_bytes(hurt.data)
        what = f"{file.relative_to(work)}: {hurt.what}"
        got = self._verbs(work / "data", work / "out")
        for name, value in got.items():
            if value is not None and value != self.expected[name] and file.suffix == ".parquet":
                raise Finding(f"{what}: {name} gives other rows than for the whole dataset, without a word")
        return what

    def _verbs(self, data: Path, out: Path) -> dict[str, Any]:
        def rows(made: aligncurate.Dataset) -> Any:
            return made.scan().drop("level", strict=False).collect().rows() if made.files else []

        verbs: dict[str, Callable[[], Any]] = {
            "filter": lambda: rows(aligncurate.filter(data, out / "filtered", where="score is not null", quiet=True)),
            "bucket": lambda: rows(aligncurate.bucket(data, out / "bucketed", levels=2, quiet=True)),
            "inspect": lambda: aligncurate.inspect(data).rows,
            "export": lambda: aligncurate.export(data, out / "tars", quiet=True).rows,
            "ingest": lambda: _rows(ingest(data, out / "again")),
        }
        results: dict[str, Any] = {}
        for name, verb in verbs.items():
            try:
                results[name] = verb()
            except AlignCurateError as error:
                check_sentence(str(error))
                results[name] = None
        return results


def _rows(frame: pl.DataFrame | None) -> int | None:
    """How many rows there are; None if their part was refused."""
    return None if frame is None else len(frame) or None


class Training(Target):
    """Any file of a checkpoint or an index: the run is refused, or ends with the weights of an undisturbed run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import torch

        from aligntrain import train
        from tests.support.stage_data import captions, make_models, pretraining

        torch.set_num_threads(1)
        self._train = train
        models = make_models(folder)
        data = captions(folder / "c.tar")
        self._config = lambda out, steps: pretraining(models, data, out, epochs=2, max_steps=steps, save_every=2)
        train(self._config(folder / "whole", None))
        self.whole = self._weights(folder / "whole")
        # A run that was stopped after the second checkpoint.
        import signal

        from aligntrain.training import checkpoint

        real, written = checkpoint.sync, []

        def stop_after(path: Path) -> None:
            real(path)
            written.append(path)
            if "step-00000004" in str(path):
                signal.raise_signal(signal.SIGTERM)

        checkpoint.sync = stop_after
        try:
            train(self._config(folder / "stopped", None))
        finally:
            checkpoint.sync = real
        assert not (folder / "stopped" / "model.safetensors").exists()

    def _weights(self, out: Path) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(out / "model.safetensors")

    def run(self, rng: random.Random, work: Path) -> str:
        import torch

        out = work / "out"
        shutil.copytree(self.folder / "stopped", out)
        files = sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".jsonl")
        file = rng.choice(files)
        if rng.random() < 0.1:
            what = f"{file.relative_to(out)}: deleted"
            file.unlink()
        else:
            hurt = damage(file.read_bytes(), rng, text=file.suffix == ".json")
            what = f"{file.relative_to(out)}: {hurt.what}"
            file.write_bytes(hurt.data)
        try:
            self._train(self._config(out, None))
        except AlignCurateError as error:
            check_sentence(str(error))
            return what
        weights = self._weights(out)
        if any(not torch.equal(weights[name], tensor) for name, tensor in self.whole.items()):
            raise Finding(f"{what}: the run went on and ended with other weights")
        return what


TARGETS: dict[str, Callable[[Path], Target]] = {
    "images": Images,
    "tar": Tar,
    "parquet": Parquet,
    "csv": lambda folder: Rows(folder, "csv"),
    "jsonl": lambda folder: Rows(folder, "jsonl"),
    "json": lambda folder: Rows(folder, "json"),
    "dataset": Dataset,
    "training": Training,
}
