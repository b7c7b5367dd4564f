"""Every verb from and to an S3 server: the same bytes as on a local disk, after any fault."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import aligncurate
from tests.support.inputs import cli, complaint, pairs, write_tar
from tests.support.s3 import S3, forget_file_systems, serving
from tests.support.s3_sweep import fill, sweep

OUT = "s3://bucket/"


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with serving() as s3:
        yield s3


@pytest.fixture
def s3(server: S3) -> S3:
    server.begin()
    return server


def local_files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", pairs(4, 4 * number))
    return tmp_path / "*.tar"


def test_scores_are_the_same_bytes_as_on_a_local_disk_and_a_rerun_has_nothing_to_do(s3, tars, tmp_path) -> None:
    command = ("score", tars, "--model", "tiny", "--out")
    assert cli(*command, tmp_path / "out").exit_code == 0
    assert cli(*command, OUT + "scored").exit_code == 0
    assert s3.files("scored/") == local_files(tmp_path / "out")
    before = s3.files("scored/")
    again = cli(*command, OUT + "scored")
    assert "nothing to do: 3 parts in s3://bucket/scored" in again.stdout
    assert s3.files("scored/") == before


def test_every_verb_reads_and_writes_there(s3, tars, tmp_path) -> None:
    """Each command runs on local folders and on the server; the outputs differ only in where their inputs are."""
    table = tmp_path / "more.csv"
    table.write_text("key,stars\ns1,3\ns5,4\n")
    aligncurate.score(tars, tmp_path / "scored", model="tiny", quiet=True)
    aligncurate.score(tars, OUT + "v/scored", model="tiny", quiet=True)
    s3.put("v/more.csv", table.read_bytes())
    commands = [
        "bucket @scored --levels 3 --out @levelled",
        "bucket @scored --thresholds @levelled --out @frozen",
        "filter @levelled --levels 2-3 --out @best",
        "filter @levelled --sample 5 --rows-per-part 3 --out @compact",
        "merge @best @compact --out @merged",
        "join @levelled @more.csv --out @joined",
        "merge @joined @levelled --out @widened",
        "ingest @levelled --out @ingested",
        "export @levelled --out @tars --shard-size 5",
        "export @levelled --per-level --out @by-level",
        "export @levelled --format llava-json --out @llava",
        "export @levelled --format datacomp-uids --out @uids",
        "filter @levelled --uids @uids/uids.npy --out @listed",
    ]
    for command in commands:
        out = re.findall("--out @([a-z-]+)", command)[0]
        for root in (f"{tmp_path}/", OUT + "v/"):
            result = cli(*command.replace("@", root).split())
            assert result.exit_code == 0, (command, result.output)
        here, there = local_files(tmp_path / out), s3.files(f"v/{out}/")
        assert here.keys() == there.keys(), out
        for name in here:  # where the inputs are is in the manifest, and in the receipts where parts are the shards
            if name in ("manifest.json", "export.json") or (out == "ingested" and ".receipts" in name):
                assert json.loads(here[name]).keys() == json.loads(there[name]).keys()
            else:
                assert here[name] == there[name], (out, name)
    for command in (["inspect", OUT + "v/levelled"], ["inspect", OUT + "v/best", OUT + "v/levelled", "--json"]):
        assert cli(*command).exit_code == 0


def test_a_killed_run_goes_on_where_it_was(s3, tars, tmp_path) -> None:
    cli("ingest", tars, "--out", tmp_path / "out")
    right = local_files(tmp_path / "out")
    assert cli("ingest", tars, "--out", OUT + "killed").exit_code == 0
    put_requests = [n for n, request in enumerate(s3.requests) if request.startswith("PUT")]
    for number in put_requests[::4]:
        out = f"killed-{number}"
        s3.begin(dict.fromkeys(range(number, 10000), 403))
        assert cli("ingest", tars, "--out", OUT + out).exit_code != 0
        s3.begin()
        result = cli("ingest", tars, "--out", OUT + out)
        assert result.exit_code == 0, result.output
        assert s3.files(out + "/") == right


def test_scores_and_levels_are_read_from_there_for_training(s3, tars, tmp_path) -> None:
    from aligncurate.sources.detect import open_source

    aligncurate.ingest(tars, OUT + "train", quiet=True)
    source = open_source(OUT + "train")
    rows = [pair for shard in source.shards for pair in source.read(shard)]
    assert [row.key for row in rows] == [f"s{n}" for n in range(12)]


def test_parts_of_one_store_are_merged_without_passing_through_this_machine(s3, tars) -> None:
    for name in ("one", "two"):
        aligncurate.ingest(tars, f"{OUT}{name}", quiet=True)
    s3.begin()
    assert cli("merge", OUT + "one", OUT + "two", "--out", OUT + "both").exit_code == 0
    uploads = [request for request in s3.requests if request.startswith("PUT /bucket/both/data")]
    assert len(uploads) == 6
    one, two, both = (s3.files(f"{name}/data/") for name in ("one", "two", "both"))
    assert list(both.values()) == [*one.values(), *two.values()]
    downloads = [request for request in s3.requests if request.startswith("GET") and ".parquet" in request]
    assert len(downloads) <= 2  # for the columns


def test_another_folder_is_refused_as_on_a_disk(s3, tars) -> None:
    s3.put("other/notes.txt", b"mine")
    found = complaint(cli("ingest", tars, "--out", OUT + "other"))
    assert found == "s3://bucket/other: the output folder holds other files (notes.txt); choose a new folder."
    found = complaint(cli("ingest", tars, "--out", OUT + "other/notes.txt"))
    assert found == "s3://bucket/other/notes.txt: --out must be a folder, but this is a file."
    found = complaint(cli("inspect", OUT + "nothing"))
    assert found.startswith("s3://bucket/nothing: not a dataset: no such folder; give")


@pytest.mark.parametrize(("fault", "every"), [(503, 13), ("reset", 29), ("lost", 29), ("short", 29), ("wrong", 29)])
def test_a_fault_at_a_request_changes_nothing(s3, fault, every) -> None:
    """All faults at every request: `python -m tests.support.s3_sweep`."""
    fill(s3)
    assert sweep(s3, fault, every=every)["at once"]


def test_a_fault_that_stays_gives_a_sentence_and_a_rerun_goes_on(s3) -> None:
    fill(s3)
    assert sweep(s3, 503, every=29, steady=True)["by a rerun"]


def test_what_cannot_be_written_to_or_read_is_a_sentence_that_says_what_to_do(s3, tars) -> None:
    missing = complaint(cli("ingest", tars, "--out", "s3://no-such-bucket/out"))
    assert missing == (
        "s3://no-such-bucket/out/manifest.json: the bucket does not exist; create it, or check its name."
    )
    assert complaint(cli("inspect", "s3://no-such-bucket/in")).startswith("s3://no-such-bucket/in: not a dataset")
    assert "s3://bucket/no.tar: there is no such" in complaint(cli("ingest", OUT + "no.tar", "--out", OUT + "x"))
    s3.always = 403
    out = ("--out", OUT + "x")
    for words in (("ingest", tars, *out), ("inspect", OUT + "x"), ("ingest", OUT + "a.tar", *out)):
        found = complaint(cli(*words))
        assert found.startswith("s3://bucket/") and "access refused" in found and "check the credentials" in found
    s3.begin()
    assert "use s3://, gs:// or a local folder" in complaint(cli("ingest", tars, "--out", f"http://{s3.address}/x"))
    assert complaint(cli("ingest", tars, "--out", "s3://")).startswith("s3://: name a folder too")


@pytest.mark.parametrize(
    ("variables", "code", "words"),
    [
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, 2, ("no credentials", "set AWS_ACCESS_KEY_ID")),
        ({"AWS_PROFILE": "nobody"}, 2, ("no credentials", "nobody", "AWS_PROFILE")),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 1, ("Could not connect", "127.0.0.1:9", "check the network")),
        ({"AWS_ENDPOINT_URL": "http://no-host.invalid"}, 1, ("no-host.invalid", "check the network")),
    ],
)
def test_credentials_and_hosts_that_are_wrong_are_named(s3, tars, monkeypatch, variables, code, words) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    forget_file_systems()
    try:
        found = complaint(cli("ingest", tars, "--out", OUT + "x"), code)
        assert found.startswith("s3://bucket/x/") and all(word in found for word in words), found
    finally:
        monkeypatch.undo()
        forget_file_systems()


def test_a_missing_package_is_named_by_its_extra(tars, monkeypatch) -> None:
    import fsspec

    def absent(*_: object, **__: object) -> None:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    found = complaint(cli("ingest", tars, "--out", "gs://bucket/x"))
    assert found.endswith("gs:// needs a package that is not installed; install aligncurate[gcs].")


def test_damage_there_is_found_and_mended(s3, tars) -> None:
    aligncurate.ingest(tars, OUT + "v2/one", quiet=True)
    aligncurate.filter(OUT + "v2/one", OUT + "v2/two", where="width > 0", quiet=True)
    right = s3.files("v2/")
    assert cli("verify", OUT + "v2/one", OUT + "v2/two", "--deep").exit_code == 0
    part = "two/data/part-00001.parquet"
    damaged = bytearray(right[part])
    damaged[len(damaged) // 2] ^= 1
    s3.put(f"v2/{part}", bytes(damaged))
    s3.put("v2/one/.receipts/part-00002.json", b"{}")
    result = cli("verify", OUT + "v2/one", OUT + "v2/two")
    assert result.exit_code == 1
    assert f"s3://bucket/v2/{part}: its bytes have changed" in result.output
    assert "s3://bucket/v2/one/.receipts/part-00002.json: " in result.output
    assert cli("verify", OUT + "v2/one", OUT + "v2/two", "--repair").exit_code == 0
    assert s3.files("v2/") == right


def test_partitions_share_a_folder_there(s3, tars, tmp_path) -> None:
    aligncurate.ingest(tars, tmp_path / "out", quiet=True)
    for part in ("2/2", "1/2"):
        aligncurate.ingest(tars, OUT + "shared", partition=part, quiet=True)
    assert s3.files("shared/") == local_files(tmp_path / "out")
