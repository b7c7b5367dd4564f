"""The command line: what it prints, its exit codes, how quickly it starts."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import aligncurate
from aligncurate.cli.app import app
from aligncurate.demo.scenes import write_tars
from aligncurate.encoders.model_choice import TINY_FOLDER
from aligncurate.io import storage
from tests.support.inputs import cli, complaint, jpeg, pairs, write_tar

AT_LEAST_LOADED = (
    "import sys; import {}; print(sorted(sys.modules.keys() & {{'torch','open_clip','polars','pyarrow'}}))"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`scored` and `levelled` datasets of 60 scenes, one of whose images is broken."""
    path = tmp_path_factory.mktemp("cli")
    write_tars(path / "tars", 60, seed=8, shard_size=30)
    tar = path / "tars/00000.tar"
    data = bytearray(tar.read_bytes())
    data[512:640] = b"x" * 128  # the first image
    tar.write_bytes(data)
    result = run("score", path / "tars", "--out", path / "scored", "--model", "tiny")
    assert result.exit_code == 0, result.output
    assert run("bucket", path / "scored", "--out", path / "levelled").exit_code == 0
    return path


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("name", ["aligncurate", "aligncurate.cli.app"])
def test_importing_is_light(name) -> None:
    code = AT_LEAST_LOADED.format(name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names() -> None:
    assert aligncurate.__all__ == [
        "Dataset", "SourceOptions", "bucket", "export", "filter", "finish", "ingest", "inspect", "join", "merge",
        "open_dataset", "open_source", "score", "verify",
    ]  # fmt: skip
    for name in aligncurate.__all__:
        assert getattr(aligncurate, name).__doc__
    assert set(aligncurate.__all__) <= set(dir(aligncurate))
    with pytest.raises(AttributeError, match="no attribute 'bukcet'"):
        _ = aligncurate.bukcet


def test_version_and_help() -> None:
    assert run("--version").output == f"aligncurate {aligncurate.__version__}\n"
    text = run("--help").output
    for verb in ("score", "ingest", "bucket", "inspect", "filter", "export", "demo", "models"):
        assert verb in text


def test_score_ends_with_a_summary(folder) -> None:
    result = run("score", folder / "tars", "--out", folder / "again", "--model", "tiny")
    assert result.exit_code == 0
    assert "scored 60 rows" in result.stdout
    assert "ok 59" in result.stdout and "decode_error 1" in result.stdout
    again = run("score", folder / "tars", "--out", folder / "again", "--model", "tiny")
    assert again.exit_code == 0
    assert "nothing to do: 2 parts in" in again.stdout


def test_quiet_prints_nothing(folder) -> None:
    for words in (
        ("ingest", folder / "tars", "--out", folder / "q1"),
        ("bucket", folder / "scored", "--out", folder / "q2"),
        ("filter", folder / "levelled", "--out", folder / "q3", "--levels", "8"),
        ("export", folder / "levelled", "--out", folder / "q4"),
    ):
        result = run(*words, "--quiet")
        assert (result.exit_code, result.output) == (0, "")


def test_inspect_says_the_same_in_json(folder) -> None:
    text = run("inspect", folder / "levelled", "--examples", 2).output
    found = json.loads(run("inspect", folder / "levelled", "--examples", 2, "--json").output)
    frame = aligncurate.open_dataset(folder / "levelled").scan().collect()
    assert found["rows"] == 60
    assert found["statuses"] == {"ok": 59, "decode_error": 1}
    scores = sorted(frame["score"].drop_nulls().to_list())
    assert found["quantiles"]["0.5"] == scores[29]
    assert (found["quantiles"]["0"], found["quantiles"]["1"]) == (scores[0], scores[-1])
    assert found["mean"] == pytest.approx(sum(scores) / 59)
    assert sum(found["histogram"]["counts"]) == 59
    assert [level["level"] for level in found["levels"]] == [1, 2, 3, 4, 5, 6, 7, 8, None]
    for level in found["levels"][:8]:
        some = frame.filter(frame["level"] == level["level"])
        assert level["count"] == some.height
        assert level["share"] == pytest.approx(some.height / 60)
        assert (level["minimum"], level["maximum"]) == (some["score"].min(), some["score"].max())
        assert level["mean"] == pytest.approx(some["score"].mean())
        assert len(level["examples"]) == 2
        for example in level["examples"]:
            row = some.filter(some["key"] == example["key"]).row(0, named=True)
            assert (row["caption"], row["score"]) == (example["text"], example["score"])
    assert "decode_error" in text and "not an image" in text
    assert "█" in text and "Examples" in text


@pytest.mark.parametrize(
    "words", [("inspect",), ("bucket", "--out", "x"), ("filter", "--out", "x"), ("export", "--out", "x")]
)
def test_a_missing_dataset_is_a_mistake(tmp_path, monkeypatch, words) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(words[0], "nowhere", *words[1:])
    assert result.exit_code == 2
    assert "nowhere: not a dataset" in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_named(folder) -> None:
    (folder / "half").mkdir()
    manifest = json.loads((folder / "scored/manifest.json").read_text())
    (folder / "half/manifest.json").write_text(json.dumps({**manifest, "complete": False, "parts": []}))
    result = run("inspect", folder / "half")
    assert result.exit_code == 2
    assert "run its `aligncurate score` command again" in " ".join(result.stderr.split())


def test_a_shard_that_cannot_be_read_is_a_fault(folder, monkeypatch) -> None:
    real = storage.open_file

    def fails(uri: str):
        if uri.endswith("00001.tar"):
            raise OSError(5, "Input/output error", uri)
        return real(uri)

    monkeypatch.setattr(storage, "open_file", fails)
    result = run("ingest", folder / "tars", "--out", folder / "mixed-out")
    assert result.exit_code == 1
    assert "00001.tar: cannot be read: Input/output error" in " ".join(result.stderr.split())
    assert "rerun to resume" in " ".join(result.stderr.split())
    assert (folder / "mixed-out/data/part-00000.parquet").is_file()


def test_models_lists_the_default_and_the_built_in() -> None:
    text = run("models").output
    assert "tiny" in text and "ViT-L-14-quickgelu (default)" in " ".join(text.split())


def test_the_demo_shows_that_levels_follow_correctness(tmp_path) -> None:
    result = run("demo", "--out", tmp_path / "demo", "--count", 400)
    assert result.exit_code == 0, result.output
    frame = aligncurate.open_dataset(tmp_path / "demo/levelled").scan().collect()
    means = {kind: frame.filter(frame["correctness"] == kind)["level"].mean() for kind in frame["correctness"].unique()}
    assert means["right"] > means["one_detail_wrong"] > means["unrelated"]
    assert means["right"] > means["one_object_wrong"] > means["unrelated"]
    assert "fully right" in result.output and "aligncurate inspect" in result.output
    assert (tmp_path / "demo/shards/00000.tar").is_file()
    again = run("demo", "--out", tmp_path / "demo", "--count", 400)
    assert again.exit_code == 0
    for name in ("thesis.txt", ".env"):
        mine = tmp_path / f"mine-{name}"
        mine.mkdir()
        (mine / name).touch()
        assert run("demo", "--out", mine).exit_code == 2
        assert [path.name for path in mine.iterdir() if path.name != ".lock"] == [name]


def test_the_demo_deletes_only_what_it_made(tmp_path) -> None:
    assert run("demo", "--out", tmp_path, "--count", 100, "--no-train", "--quiet").exit_code == 0
    (tmp_path / "notes.txt").touch()
    assert run("demo", "--out", tmp_path, "--count", 100, "--no-train", "--quiet").exit_code == 0
    assert (tmp_path / "notes.txt").exists()


def test_a_run_without_a_good_row_says_so_and_sends_nobody_on(tmp_path) -> None:
    (tmp_path / "rows.csv").write_text("image,caption\n/elsewhere/a.jpg,a\n")
    told = cli("ingest", tmp_path / "rows.csv", "--out", tmp_path / "out")
    assert told.exit_code == 0
    assert "no row can be used" in told.stdout
    assert "next:" not in told.stdout
    assert "set --image-root" in cli("inspect", tmp_path / "out", "--json").stdout


def test_the_next_steps_run_as_they_are_printed(tmp_path, monkeypatch) -> None:
    """Paths in them are those that were typed, quoted for the shell; the steps that need no model are run."""
    monkeypatch.chdir(tmp_path)
    write_tars(tmp_path / "my tars", 40, seed=8)
    result = run("score", "my tars", "--out", "it's scored", "--model", "tiny")
    for number, verb in enumerate(["bucket", "filter", "export"]):
        line = next(line for line in result.stdout.splitlines() if line.startswith("next: "))
        words = shlex.split(line.removeprefix("next: ").partition(", or ")[0])
        assert words[:2] == ["aligncurate", verb] and not any(word.startswith("/") for word in words)
        words[-1] = f"out {number}"
        result = run(*words[1:])
        assert result.exit_code == 0, result.output
    assert "next: aligncurate train pretrain 'out 2' --llm LLM --vision TOWER --out MODEL" in result.stdout
    result = run("export", "out 1", "--out", "u", "--format", "datacomp-uids")
    assert "next: aligncurate filter 'out 1' --uids u/uids.npy --out SUBSET" in result.stdout
    assert str(tmp_path) not in result.stdout


def test_the_tiny_encoder_is_for_drawn_scenes(tmp_path, folder) -> None:
    write_tar(tmp_path / "photos.tar", pairs(2))
    said = "knows only the drawn scenes"
    assert said in " ".join(
        run("score", tmp_path / "photos.tar", "--out", tmp_path / "a", "--model", "tiny").stderr.split()
    )
    quiet = run("score", tmp_path / "photos.tar", "--out", tmp_path / "b", "--model", "tiny", "--quiet")
    assert quiet.output == ""
    scenes = run("score", folder / "tars", "--out", tmp_path / "c", "--model", "tiny").stderr
    assert said not in " ".join(scenes.split()) and "loading tiny" in scenes


def test_bucket_tells_of_fewer_scores_than_levels(tmp_path) -> None:
    table = "image,caption,score\n" + "".join(f"{i}.jpg,caption {i},{0.1 * (i % 3)}\n" for i in range(30))
    (tmp_path / "rows.csv").write_text(table)
    for i in range(30):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    assert run("ingest", tmp_path / "rows.csv", "--out", tmp_path / "in").exit_code == 0
    told = run("bucket", tmp_path / "in", "--out", tmp_path / "out")
    assert "only 3 of the 8 levels get pairs; use --levels 3 or fewer" in " ".join(told.stderr.split())
    frame = aligncurate.open_dataset(tmp_path / "out").scan().collect()
    assert frame["level"].n_unique() == 3
    assert "levels get pairs" not in run("bucket", tmp_path / "in", "--out", tmp_path / "three", "--levels", 3).stderr


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path, monkeypatch, folder) -> None:
    monkeypatch.chdir(tmp_path)
    table = "image,caption\n" + "".join(f"{i}.jpg,caption {i}\n" for i in range(25))
    (tmp_path / "rows.csv").write_text(table)
    words = ("ingest", "rows.csv", folder / "tars", "--rows-per-shard", 10, "--out", "out")
    before = sorted(tmp_path.rglob("*"))
    for command in (words, ("score", *words[1:], "--model", "tiny")):
        told = run(*command, "--dry-run").stdout
        assert f"table: 1 file, 0.0 MB: {tmp_path / 'rows.csv'}" in told or "table: 1 file, 0.0 MB: rows.csv" in told
        assert "webdataset: 2 files" in told and "85 rows in 5 parts into out" in told
        assert sorted(tmp_path.rglob("*")) == before
    assert "would score with tiny: 12 rows in 2 parts" in run(*command, "--limit", 12, "--dry-run").stdout
    assert run(*words, "--limit", 12).exit_code == 0
    after = sorted(tmp_path.rglob("*"))
    assert "2 of 2 parts are there, 0 to do" in run(*words, "--limit", 12, "--dry-run").stdout
    assert sorted(tmp_path.rglob("*")) == after
    assert "no such file" in run("score", "nothing.tar", "--out", "out", "--dry-run").stderr


def test_a_dry_run_counts_the_parts_that_are_there(tmp_path, monkeypatch, folder) -> None:
    monkeypatch.chdir(tmp_path)
    tars = sorted((folder / "tars").glob("*.tar"))
    for verb in (("ingest",), ("score", "--model", "tiny", "--embeddings", "fp16")):
        out = f"out-{verb[0]}"
        assert run(*verb, tars[0], "--out", out).exit_code == 0
        assert "1 of 1 part is there, 0 to do" in run(*verb, tars[0], "--out", out, "--dry-run").stdout
        assert "1 of 2 parts is there, 1 to do" in run(*verb, *tars[:2], "--out", out, "--dry-run").stdout
        next(Path(out, ".receipts").iterdir()).unlink()
        assert "there" not in run(*verb, tars[0], "--out", out, "--dry-run").stdout


def test_a_dry_run_is_refused_as_the_run_would_be(tmp_path, monkeypatch, folder) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(TINY_FOLDER / "tiny.safetensors", tmp_path)
    tar = write_tar(tmp_path / "a.tar", pairs(2))
    for made, *others in (
        ("ingest", "ingest --embed-images", "score --model tiny", "ingest --limit 1", "ingest --captions first"),
        (
            "score --model tiny", "score --model tiny --decode fast", "score --model tiny --embeddings fp16",
            "score --model tiny --precision bf16", "score --model tiny --batch-size 7", "score --model tinny",
            "score --model tiny,tiny --pretrained ,tiny.safetensors",
        ),
    ):  # fmt: skip
        out = made.split()[0]
        assert run(*made.split(), tar, "--out", out).exit_code == 0
        for now in others:
            real = complaint(run(*now.split(), tar, "--out", out))
            assert complaint(run(*now.split(), tar, "--out", out, "--dry-run")) == real
    for place, sentence in ((".", "holds other files"), ("tiny.safetensors", "this is a file")):
        real = complaint(run("ingest", tar, "--out", place))
        assert sentence in real and complaint(run("ingest", tar, "--out", place, "--dry-run")) == real


def test_what_follows_an_ingest_depends_on_what_the_source_brought(tmp_path, folder) -> None:
    for number, (columns, following) in enumerate(
        (
            ("image,caption\n{}.jpg,c\n", "aligncurate score"),
            ("image,caption,score\n{}.jpg,c,0.3\n", "aligncurate bucket"),
            ("image,caption,score,level\n{}.jpg,c,0.3,2\n", "aligncurate inspect"),
        )
    ):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
        (tmp_path / f"{number}.csv").write_text(columns.format(number))
        told = run("ingest", tmp_path / f"{number}.csv", "--out", tmp_path / f"out{number}").stdout
        assert f"next: {following} " in told
    assert "next: aligncurate bucket" in run("ingest", folder / "scored", "--out", tmp_path / "again").stdout


def test_several_datasets_are_shown_as_made_by_their_own_verbs(tmp_path, folder) -> None:
    assert run("filter", folder / "scored", "--min-score", 0.1, "--out", tmp_path / "kept").exit_code == 0
    assert run("score", folder / "tars/00001.tar", "--model", "tiny", "--out", tmp_path / "more").exit_code == 0
    assert "made by `score`\n" in run("inspect", folder / "scored").stdout
    assert "made by `filter` and `score`\n" in run("inspect", tmp_path / "kept", tmp_path / "more").stdout
