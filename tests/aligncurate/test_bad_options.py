"""Wrong arguments, and output folders that cannot be used."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

import aligncurate
from tests.support.inputs import cli, complaint, ingested, jpeg, pairs, statuses, write_tar


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pears.tar"], "there is no such file or folder; did you mean .*pairs.tar"),
        (["pairs-{0..1}.tar"], "pairs-0.tar.*no such file"),
        (["pairs{.tar"], "no such file"),
        (["*.jsonl"], "no file matches"),
        (["nowhere/pairs.tar"], "no such file"),
        (["x" * 300], "no such file"),
        (["empty"], "the folder is empty"),
        (["images"], "only images"),
        (["notes"], "no tars, Parquet"),
        (["pairs.tar", "--format", "dataset"], "not a dataset"),
        (["images", "--format", "table"], "no files for --format table"),
        (["t.csv", "--caption-column", "captoin"], "--caption-column captoin.*it has image, caption"),
        (["t.csv", "--image-column", "picture"], "--image-column picture.*it has image, caption"),
        (["t.csv", "--image-root", "nowhere"], "--image-root .*no such folder"),
        (["t.csv", "--image-root", "notes/x.md"], "--image-root .*neither a folder nor a tar"),
        (["pairs.tar", "--limit", "0"], "--limit 0.*at least 1"),
        (["pairs.tar", "--workers", "-2"], "--workers -2.*at least 1"),
        (["t.csv", "--rows-per-shard", "0"], "--rows-per-shard 0.*at least 1"),
        (["nosuch://bucket/a.tar"], "nosuch"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "",
)
def test_mistakes_in_arguments(tmp_path, monkeypatch, arguments, sentence) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(Path("pairs.tar"), pairs(1))
    for folder in ("empty", "images", "notes"):
        Path(folder).mkdir()
    Path("images/0.jpg").write_bytes(jpeg())
    Path("notes/x.md").write_text("x")
    Path("t.csv").write_text("image,caption\nimages/0.jpg,c\n")
    found = complaint(cli("ingest", *arguments, "--out", "out"))
    assert pl.Series([found]).str.contains(sentence).all(), found
    assert not Path("out").exists()


def test_an_output_folder_that_is_taken(tmp_path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(3))
    other = write_tar(tmp_path / "b.tar", pairs(3))
    out = tmp_path / "out"
    assert cli("ingest", tar, "--out", out).exit_code == 0
    before = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for arguments, difference in (
        ((tar, "--limit", 2), "made without --limit, now with 2"),
        ((tar, "--embed-images"), "made without --embed-images, now with it"),
        ((other,), f"inputs: {other} has been added, but not after the others; inputs: {tar} has been removed"),
        ((other, tar), f"inputs: {other} has been added, but not after the others"),
        ((tar, "--caption-column", "x"), "made without --caption-column, now with x"),
    ):
        found = complaint(cli("ingest", *arguments, "--out", out))
        assert f"this folder holds a different dataset ({difference}); choose another --out" in found
    assert "nothing is changed in place" in complaint(cli("filter", out, "--sample", 1, "--out", out))
    assert {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert cli("ingest", tar, "--out", out).exit_code == 0


def test_an_output_that_is_a_file_or_a_strangers_folder(tmp_path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(1))
    assert "this is a file" in complaint(cli("ingest", tar, "--out", tar))
    assert complaint(cli("ingest", tar, "--out", tar / "below"))
    assert "holds other files (a.tar)" in complaint(cli("ingest", tar, "--out", tmp_path))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/manifest.json").write_text("{")
    assert "not a JSON file" in complaint(cli("ingest", tar, "--out", tmp_path / "bad"))
    for text in ("[]", "{}", "7"):
        (tmp_path / "bad/manifest.json").write_text(text)
        complaint(cli("ingest", tar, "--out", tmp_path / "bad"))
        complaint(cli("inspect", tmp_path / "bad"))


@pytest.fixture
def little_space():
    """Limits how large files may grow, which fails like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def allow(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield allow
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 3_000, 30_000])
def test_no_space_left(tmp_path, little_space, size) -> None:
    samples = {f"s{i}": {"jpg": jpeg(i, width=200, height=200), "txt": b"x"} for i in range(30)}
    tar, out = write_tar(tmp_path / "a.tar", samples), tmp_path / "out"
    little_space(size)
    result = cli("ingest", tar, "--out", out, "--embed-images", "--quiet")
    little_space(resource.RLIM_INFINITY)
    assert "File too large" in complaint(result, code=1)
    assert not list(out.glob("part-*"))
    assert not list(out.glob(".tmp-*"))
    assert cli("ingest", tar, "--out", out, "--embed-images").exit_code == 0
    fresh = aligncurate.ingest(tar, tmp_path / "fresh", embed_images=True, quiet=True).dataset
    assert (out / "data/part-00000.parquet").read_bytes() == fresh.files[0].read_bytes()


# Root may write everywhere, unless it gives up the two capabilities that let it. The bounding set is applied by exec.
_WITHOUT_ROOT = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
for capability in (1, 2): libc.prctl(24, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-m", "aligncurate", *sys.argv[1:]])
"""


def as_nobody_special(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", _WITHOUT_ROOT, *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="drops capabilities with prctl")
def test_no_permission(tmp_path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(1))
    (tmp_path / "closed").mkdir(mode=0o555)
    result = as_nobody_special("ingest", tar, "--out", tmp_path / "closed/out")
    assert (result.returncode, result.stderr) == (2, f"error: {tmp_path}/closed/out: Permission denied.\n")
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "1.jpg").chmod(0)
    (tmp_path / "a.csv").write_text("image,caption\n1.jpg,closed\n2.jpg,open\n")
    result = as_nobody_special("ingest", tmp_path / "a.csv", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    frame = aligncurate.open_dataset(tmp_path / "out").scan().collect()
    assert statuses(frame) == ["read_error", "ok"] and "Permission denied" in frame["error"][0]
    tar.chmod(0)
    result = as_nobody_special("ingest", tar, "--out", tmp_path / "closed-tar")
    assert result.returncode in (1, 2) and "Permission denied" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("ingest", "--limit", 2**63), "--limit 9223372036854775808: use a number from 1 to 2^63 - 1."),
        (("ingest", "--workers", -(10**30)), f"--workers -{10**30}: use a number of at least 1."),
        (("score", "--batch-size", 10**30), f"--batch-size {10**30}: use a number from 1 to 2^63 - 1."),
    ],
)
def test_numbers_beyond_64_bits(tmp_path, arguments, sentence) -> None:
    command, *options = arguments
    assert complaint(cli(command, tmp_path, *options, "--out", tmp_path / "out")) == sentence


def test_names_that_are_not_utf8(tmp_path, monkeypatch) -> None:
    """Neither a manifest nor Parquet can keep them: one sentence, whatever they name."""
    monkeypatch.chdir(tmp_path)
    write_tar(Path("a.tar"), pairs(1))
    bad = "b\udcff"
    Path(bad).mkdir()
    write_tar(Path(bad, "a.tar"), pairs(1))
    shutil.copy("a.tar", f"{bad}.tar")
    Path(f"{bad}.csv").write_text("key,n\ns0,1\n")
    ingested("a.tar", Path("good"))
    shutil.copytree("good", f"{bad}/good")
    for arguments in (
        ["ingest", bad], ["ingest", f"{bad}.tar"], ["ingest", f"{bad}/*.tar"], ["ingest", f"{bad}/good"],
        ["ingest", "a.tar", "--image-column", bad], ["filter", f"{bad}/good"], ["filter", "good", "--where", bad],
        ["bucket", f"{bad}/good"], ["export", f"{bad}/good"], ["join", "good", f"{bad}.csv"],
    ):  # fmt: skip
        assert "UTF-8" in complaint(cli(*arguments, "--out", "out")), arguments
    assert "UTF-8" in complaint(cli("ingest", "a.tar", "--out", f"{bad}/out"))
    assert "UTF-8" in complaint(cli("inspect", f"{bad}/good"))


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (
            "bucket d --method unifrom --out x",
            "--method unifrom: use one of quantile, uniform; did you mean uniform?",
        ),
        ("score a --precision fp8 --out x", "--precision fp8: use one of auto, fp32, bf16."),
        (
            "train plan d --stage pretrian",
            "--stage pretrian: use one of pretrain, finetune; did you mean pretrain?",
        ),
        ("train pretrain d --out x --set template=v2", "--template v2: use one of plain, v1, chat."),
        ("bucket d --levels eight --out x", "--levels eight: use an integer."),
        ("filter d --min-score high --out x", "--min-score high: use a number."),
        ("demo --count 1e3", "--count 1e3: use an integer."),
        ("generate m --prompt p --temperature -0.5", "--temperature -0.5: use a number of at least 0."),
        ("chat m --max-new-tokens 0", "--max-new-tokens 0: use a number of at least 1."),
        ("bucket d --mehtod x --out x", "--mehtod: there is no such option; did you mean --method?"),
        ("ingest a --out x --frobnicate", "--frobnicate: there is no such option; `root ingest --help` lists them."),
        ("inspect d -z", "-z: there is no such option; `root inspect --help` lists them."),
        ("--foo", "--foo: there is no such option; `root --help` lists them."),
        ("score a --out x --limit", "--limit needs a value."),
        ("inspect d --json=yes", "--json does not take a value."),
        ("merge a", "--out is missing; see `root merge --help`."),
        ("bucket --out x", "DATASET is missing; see `root bucket --help`."),
        ("finish", "DATASET is missing; see `root finish --help`."),
        ("convert a", "DST is missing; see `root convert --help`."),
        ("models many", "got unexpected extra argument(s) (many); see `root models --help`."),
        ("bukcet d", "bukcet: there is no such command; did you mean bucket?"),
        ("train pretran d", "pretran: there is no such command; did you mean pretrain?"),
        ("frobnicate", "frobnicate: there is no such command; `root --help` lists them."),
    ],
)
def test_command_lines_that_cannot_be_used(command, sentence) -> None:
    assert complaint(cli(*command.split())) == sentence


def test_no_arguments_show_the_help() -> None:
    for command in ((), ("train",)):
        assert "Usage" in cli(*command).output
