"""`inspect` against numpy and polars, and how it is drawn."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

import aligncurate
from aligncurate.cli.render import render
from aligncurate.demo.scenes import write_tars
from aligncurate.progress import make_console as console
from aligncurate.verbs.inspect.result import QUANTILES, Inspection
from tests.support.inputs import cli, complaint, pairs, write_tar


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`scored`, `levelled` (with embeddings), and `plain` (frozen thresholds, no embeddings) of 120 scenes."""
    path = tmp_path_factory.mktemp("inspect")
    write_tars(path / "tars", 120, seed=4, shard_size=60)
    aligncurate.score(path / "tars", path / "scored", model="tiny", embeddings="fp16", quiet=True)
    aligncurate.bucket(path / "scored", path / "levelled", levels=4, quiet=True)
    aligncurate.score(path / "tars", path / "plain-scored", model="tiny", quiet=True)
    aligncurate.bucket(path / "plain-scored", path / "plain", thresholds=path / "levelled", quiet=True)
    return path


def drawn(inspection: Inspection, width: int) -> str:
    out = Console(width=width, file=io.StringIO(), highlight=False, emoji=False)
    out.print(render(inspection))
    return out.file.getvalue()  # type: ignore[attr-defined]


def scores_of(path: Path) -> np.ndarray:
    return aligncurate.open_dataset(path).scan().select("score").collect()["score"].drop_nulls().to_numpy()


@pytest.mark.parametrize("name", ["scored", "levelled", "plain"])
def test_the_histogram_is_numpys(folder, name) -> None:
    found = aligncurate.inspect(folder / name)
    scores = scores_of(folder / name)
    assert found.histogram is not None
    assert found.histogram.counts == np.histogram(scores, found.histogram.edges)[0].tolist()
    assert sum(found.histogram.counts) == found.scored == 120
    assert len(found.histogram.edges) == 37
    widths = np.diff(found.histogram.edges)[1:-1]
    assert np.allclose(widths, widths[0], rtol=1e-3)
    if found.mismatched is None:
        assert (found.histogram.edges[0], found.histogram.edges[-1]) == (scores.min(), scores.max())
        assert "end bins" not in drawn(found, 80)
    ranks = [int(q * 119) for q in QUANTILES]
    assert list(found.quantiles.values()) == np.sort(scores)[ranks].tolist()
    assert found.mean == pytest.approx(scores.mean(dtype=np.float64))


def test_far_outliers_share_the_end_bins(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", pairs(2))
    aligncurate.score(tmp_path / "a.tar", tmp_path / "scored", model="tiny", quiet=True)
    part = next((tmp_path / "scored").rglob("*.parquet"))
    frame = pl.read_parquet(part)
    scores = np.linspace(0, 1, 5_000, dtype=np.float32)
    scores[[0, -1]] = -1e6, 1e6
    _replace(tmp_path / "scored", frame.sample(5_000, with_replacement=True, seed=1).with_columns(score=scores))
    found = aligncurate.inspect(tmp_path / "scored")  # the counts in the manifest are not those of these rows
    assert found.histogram is not None
    assert found.histogram.edges[0] == -1e6 and found.histogram.edges[-1] == 1e6
    assert found.histogram.counts == np.histogram(scores, found.histogram.edges)[0].tolist()
    assert max(found.histogram.counts) < 5_000 / 30
    assert "the end bins reach down to -1e+06 and up to 1e+06" in drawn(found, 80)


def _replace(path: Path, frame: pl.DataFrame) -> None:
    """Put other rows into the only part of a dataset; the manifest says how many."""
    part = next(path.rglob("*.parquet"))
    schema = aligncurate.open_dataset(path).schema
    import pyarrow.parquet as pq

    pq.write_table(frame.to_arrow().cast(schema), part)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["parts"][0] |= {"rows": frame.height, "ok": frame.height, "statuses": {"ok": frame.height}}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("name", "frozen"), [("levelled", False), ("plain", True)])
def test_cuts_say_what_a_filter_keeps(folder, tmp_path, name, frozen) -> None:
    found = aligncurate.inspect(folder / name)
    assert (found.method, found.frozen) == ("quantile", frozen)
    assert [cut.level for cut in found.cuts] == [2, 3, 4]
    for cut in found.cuts:
        kept = aligncurate.filter(folder / name, tmp_path / str(cut.level), levels=f"{cut.level}-4", quiet=True)
        assert cut.count == kept.rows == np.count_nonzero(scores_of(folder / name) >= np.float32(cut.score))
        assert cut.share == kept.rows / 120
    assert found.histogram is not None
    middles = (np.array(found.histogram.edges[1:-2]) + found.histogram.edges[2:-1]) / 2
    expected = 1 + (middles[:, None] >= [cut.score for cut in found.cuts]).sum(1)
    assert found.histogram.levels[1:-1] == expected.tolist()


def test_mismatched_pairs_are_images_with_other_captions(folder) -> None:
    found = aligncurate.inspect(folder / "levelled")
    frame = aligncurate.open_dataset(folder / "levelled").scan().collect()
    expected = []
    for part in (frame[:60], frame[60:]):
        images, texts = (np.array(part[f"{n}_embedding"].to_list(), np.float32) for n in ("image", "text"))
        captions, hashes = part["caption"].to_list(), part["sha256"].to_list()
        for row in range(60):
            other = (row + 30) % 60
            if captions[row] != captions[other] and hashes[row] != hashes[other]:
                lengths = np.linalg.norm(images[row]) * np.linalg.norm(texts[other])
                expected.append(images[row] @ texts[other] / lengths)
    assert found.mismatched is not None and found.histogram is not None
    assert found.mismatched.pairs == len(expected) == sum(found.histogram.mismatched)
    assert found.mismatched.mean == pytest.approx(np.mean(expected), abs=1e-5)
    assert found.mean is not None and found.mismatched.mean < found.mean
    assert found.histogram.mismatched == np.histogram(np.float32(expected), found.histogram.edges)[0].tolist()
    for cut in found.cuts:
        assert cut.mismatched == pytest.approx(np.mean(np.array(expected) >= cut.score))
    assert f"{found.mismatched.pairs} mismatched pairs" in drawn(found, 80)


def test_without_own_embeddings_nothing_is_said_of_mismatched_pairs(folder, tmp_path) -> None:
    found = aligncurate.inspect(folder / "plain")
    assert found.mismatched is None and found.histogram is not None and found.histogram.mismatched == []
    assert all(cut.mismatched is None for cut in found.cuts)
    assert "mismatched" not in drawn(found, 80)
    # Embeddings that do not give the rows' scores belong to something else.
    aligncurate.score(folder / "tars/00000.tar", tmp_path / "other", model="tiny", embeddings="fp16", quiet=True)
    frame = aligncurate.open_dataset(tmp_path / "other").scan().collect()
    _replace(tmp_path / "other", frame.with_columns(score=pl.col("score") / 2))
    assert aligncurate.inspect(tmp_path / "other").mismatched is None


def test_mismatched_encodes_again_where_there_are_no_embeddings(folder, tmp_path) -> None:
    stored = aligncurate.inspect(folder / "levelled").mismatched
    encoded = aligncurate.inspect(folder / "plain", mismatched=True).mismatched
    assert stored is not None and encoded is not None
    assert encoded.pairs == stored.pairs
    assert encoded.mean == pytest.approx(stored.mean, abs=1e-3)
    aligncurate.export(folder / "plain", tmp_path / "shards", quiet=True)  # with scores, but without their encoder
    aligncurate.ingest(tmp_path / "shards", tmp_path / "raw", quiet=True)
    assert "does not say which encoder" in complaint(cli("inspect", tmp_path / "raw", "--mismatched"))
    manifest = json.loads((folder / "plain/manifest.json").read_text())
    manifest["encoder"] |= {"model": "ViT-B-32", "pretrained": "mine.safetensors"}
    path = tmp_path / "unnamed"
    shutil.copytree(folder / "plain", path)
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "score with --embeddings fp16" in complaint(cli("inspect", path, "--mismatched"))
    frame = aligncurate.open_dataset(folder / "plain-scored").scan().collect()
    aligncurate.score(folder / "tars/00000.tar", tmp_path / "halved", model="tiny", quiet=True)
    _replace(tmp_path / "halved", frame[:60].with_columns(score=pl.col("score") / 2))
    assert "no longer gives the scores" in complaint_of("inspect", tmp_path / "halved", "--mismatched")


@pytest.mark.parametrize("width", [20, 40, 80, 120, 200])
def test_the_drawing_has_the_heights_of_the_counts(folder, width) -> None:
    found = aligncurate.inspect(folder / "plain")
    assert found.histogram is not None
    lines = drawn(found, width).splitlines()
    assert max(len(line) for line in lines) <= width
    top = next(n for n, line in enumerate(lines) if "┤" in line)
    panel = [line.partition("┤")[2] or line.partition("│")[2] for line in lines[top : top + 8]]
    columns = ["".join(cells).strip() for cells in zip(*[line[1:] for line in panel], strict=True)]
    heights = [sum(" ▁▂▃▄▅▆▇█".index(cell) for cell in column) for column in columns]
    merge = -(-36 // (width - 5)) if width > 40 else -(-36 // max(8, width - 5))
    bins = np.add.reduceat(found.histogram.counts, np.arange(0, 36, merge))
    expected = np.ceil(bins * 64 / bins.max()).astype(int)
    per_bin = len(heights) // len(bins)
    assert per_bin >= 1 and heights == np.repeat(expected, per_bin).tolist()


def test_levels_and_thresholds_are_marked_on_the_axis(folder) -> None:
    found = aligncurate.inspect(folder / "plain")
    assert found.histogram is not None
    line = next(line for line in drawn(found, 120).splitlines() if "━" in line)
    scale = line.lstrip()
    marks = [place for place, sign in enumerate(scale) if sign == "┷"]
    edges = found.histogram.edges
    low, high = 2 * edges[1] - edges[2], 2 * edges[-2] - edges[-3]
    for mark, cut in zip(marks, found.cuts, strict=True):
        assert mark == pytest.approx((cut.score - low) / (high - low) * len(scale), abs=1.01)
    assert [sign for sign in scale if sign.isdigit()] == ["1", "2", "3", "4"]


def test_nothing_is_cut_and_markup_is_text(folder, tmp_path) -> None:
    caption = "a [bold]red[/] :bug: " + " ".join(f"word{n}" for n in range(60)) + " " + "x" * 150
    samples = pairs(3)
    samples["s0"]["txt"] = caption.encode()
    samples["broken[/]:bug:"] = {"jpg": b"no image", "txt": b"a caption"}
    write_tar(tmp_path / "a.tar", samples)
    aligncurate.score(tmp_path / "a.tar", tmp_path / "s[red]:bug:", model="tiny", quiet=True)
    aligncurate.bucket(tmp_path / "s[red]:bug:", tmp_path / "l[red]:bug:", levels=2, quiet=True)
    for width in (80, 120):
        text = drawn(aligncurate.inspect(tmp_path / "l[red]:bug:", examples=3), width)
        for words in (caption, "broken[/]:bug:", str(tmp_path / "l[red]:bug:")):
            assert "".join(words.split()) in "".join(text.split())
        assert "…" not in text.replace(" … ", "")
    piped = cli("inspect", tmp_path / "l[red]:bug:", "--examples", 3).stdout
    assert "".join(caption.split()) in "".join(piped.split())
    assert "4 rows in 1 part, made by `bucket`" in piped
    assert "decode_error" in piped and "not an image" in piped
    assert "\x1b" not in piped


def test_the_next_command_fits_the_dataset(folder, tmp_path) -> None:
    aligncurate.ingest(folder / "tars/00000.tar", tmp_path / "raw", quiet=True)
    for path, command in (
        (tmp_path / "raw", "aligncurate score"),
        (folder / "scored", "aligncurate bucket"),
        (folder / "levelled", "aligncurate filter"),
    ):
        assert f"next: {command} {path}" in cli("inspect", path).stdout


def test_json_has_everything_that_is_drawn(folder) -> None:
    found = json.loads(cli("inspect", folder / "levelled", "--json", "--examples", 1).stdout)
    assert found == json.loads(json.dumps(aligncurate.inspect(folder / "levelled", examples=1).to_json()))
    assert found["histogram"].keys() == {"edges", "counts", "levels", "mismatched"}
    assert [len(found["histogram"][name]) for name in ("edges", "counts", "levels", "mismatched")] == [37, 36, 36, 36]
    assert found["cuts"][0].keys() == {"level", "score", "count", "share", "mismatched"}


def test_the_console_leaves_text_alone(capsys) -> None:
    console().print("a :bug: in 12 files", "https://example.org/:smile:", markup=False)
    console(stderr=True).print(":bug:")
    captured = capsys.readouterr()
    assert captured.out == "a :bug: in 12 files https://example.org/:smile:\n"
    assert captured.err == ":bug:\n"


@pytest.mark.parametrize("counted", [True, False])
def test_the_scores_are_read_once(folder, monkeypatch, counted) -> None:
    dataset = aligncurate.open_dataset(folder / "levelled")
    if not counted:
        dataset.manifest.pop("score_counts", None)
    scores = scores_of(folder / "scored")
    reads, before = [], aligncurate.Dataset.read
    monkeypatch.setattr(aligncurate.Dataset, "read", lambda self, *a, **k: reads.append(a) or before(self, *a, **k))
    monkeypatch.setattr(aligncurate.Dataset, "scan", None)
    found = aligncurate.inspect(dataset)
    assert sorted(index for index, _ in reads) == [0, 1]
    assert found.mean == pytest.approx(scores.mean(dtype=np.float64))


def test_a_failure_is_shown_by_its_first_row(tmp_path) -> None:
    for number in range(3):
        samples = pairs(4, first=10 * number)
        if number:
            samples[f"broken{number}"] = {"jpg": b"no image", "txt": b"a caption"}
            samples[f"bare{number}"] = {"jpg": samples[f"s{10 * number}"]["jpg"]}
        write_tar(tmp_path / f"{number}.tar", samples)
    dataset = aligncurate.ingest([tmp_path / f"{n}.tar" for n in range(3)], tmp_path / "out", quiet=True).dataset
    frame = dataset.scan().filter(pl.col("status") != "ok").collect()
    expected = frame.group_by("status", maintain_order=True).agg(
        pl.len().alias("rows"), pl.col("key", "source", "error").first()
    )
    found = aligncurate.inspect(dataset).errors
    assert {error["status"]: error for error in found} == {row["status"]: row for row in expected.to_dicts()}
    assert len(found) == 2


def test_mismatched_with_weights_of_ones_own(folder, mini, tmp_path) -> None:
    """The config is in the manifest, so the weights are all that has to be given."""
    tar, path = folder / "tars/00000.tar", tmp_path / "scored"
    files = {"model_config": str(mini["model_config"]), "pretrained": str(mini["pretrained"])}
    aligncurate.score(tar, path, embeddings="fp16", quiet=True, **files)
    stored = aligncurate.inspect(path).mismatched
    aligncurate.score(tar, tmp_path / "plain", quiet=True, **files)
    assert "give its weights with --pretrained FILE" in complaint_of("inspect", tmp_path / "plain", "--mismatched")
    words = ["inspect", tmp_path / "plain", "--mismatched", "--pretrained", mini["pretrained"], "--json"]
    # In a new process, where nobody has told open_clip of the model.
    done = subprocess.run([sys.executable, "-m", "aligncurate", *words], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)["mismatched"]
    assert stored is not None
    assert (found["pairs"], found["mean"]) == (stored.pairs, pytest.approx(stored.mean, abs=2e-3))
    from safetensors.torch import load_file, save_file

    save_file({k: v * 1.01 for k, v in load_file(mini["pretrained"]).items()}, tmp_path / "other.safetensors")
    words = ("inspect", tmp_path / "plain", "--mismatched", "--pretrained", tmp_path / "other.safetensors")
    assert "not the weights of mini-clip that made the scores" in complaint_of(*words)
    assert "is for --mismatched" in complaint_of("inspect", tmp_path / "plain", "--pretrained", "x")


def complaint_of(*words: object) -> str:
    """The error of a command, below its notes."""
    result = cli(*words)
    assert result.exit_code == 2
    return result.stderr.strip().splitlines()[-1]
