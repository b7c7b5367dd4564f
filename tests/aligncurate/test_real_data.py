"""Every verb, one after the other, on real photos with a real encoder."""

import shutil
from pathlib import Path

import pytest

import aligncurate
from tests.support.inputs import cli

CHAIN = {
    "flickr8k/dev-00000.tar": {"ok": 120},
    "flickr8k/match_nomatch.Dev.tsv": {"ok": 120},
    "coco": {"ok": 120},
    "daquar": {"ok": 120},
    "fixtures/data_juicer": {"ok": 3},
    "fixtures/llama_factory": {"ok": 4, "multi_image": 2},
    "fixtures/xtuner": {"multi_image": 21, "ok": 22, "missing_caption": 2},
}


@pytest.mark.parametrize("name", CHAIN)
def test_the_verbs_run_through(tmp_path, data_root, name) -> None:
    source = data_root / name
    if name == "fixtures/xtuner":  # its annotations name images in a folder that the copy does not have
        shutil.copytree(source, tmp_path / "xtuner")
        (tmp_path / "xtuner/resource").symlink_to(source)
        source = tmp_path / "xtuner"
    clip = data_root / "flickr-clip/flickr-clip"
    model = ("--model-config", f"{clip}.json", "--pretrained", f"{clip}.safetensors")
    links = ("--image-root", source) if name == "fixtures/xtuner" else ()
    run(tmp_path, "score", source, "--out", "scored", *model, "--limit", 120, *links)
    scored = aligncurate.open_dataset(tmp_path / "scored")
    assert scored.statuses == CHAIN[name]
    run(tmp_path, "bucket", "scored", "--out", "levelled")
    assert "Levels (quantile)" in run(tmp_path, "inspect", "levelled", "--examples", 1)
    run(tmp_path, "filter", "levelled", "--out", "best", "--levels", "5-8", "--where", "width > 0")
    best = aligncurate.open_dataset(tmp_path / "best")
    levels = scored.statuses["ok"] - sum(level.count for level in aligncurate.inspect(tmp_path / "levelled").levels[:4])
    assert best.rows == levels > 0
    for form in ("webdataset", "llava-json", "datacomp-uids"):
        run(tmp_path, "export", "best", "--out", form, "--format", form)
    for form in ("webdataset", "llava-json"):
        run(tmp_path, "score", form, "--out", f"again-{form}", *model)
        again = aligncurate.open_dataset(tmp_path / f"again-{form}").scan().select("key", "score", "sha256").collect()
        assert again["sha256"].to_list() == best.scan().collect()["sha256"].to_list()
        for new, old in zip(again["score"], best.scan().collect()["score"], strict=True):
            assert new == pytest.approx(old, abs=1e-5)


def test_images_without_captions_are_kept_and_explained(tmp_path, data_root) -> None:
    run(tmp_path, "ingest", data_root / "fixtures/clip_retrieval", "--out", "in")
    assert aligncurate.open_dataset(tmp_path / "in").statuses == {"missing_caption": 11}
    assert "there is no caption" in " ".join(run(tmp_path, "inspect", "in").split())
    refused = cli("bucket", tmp_path / "in", "--out", tmp_path / "no")
    assert refused.exit_code == 2 and "nothing to bucket" in " ".join(refused.stderr.split())
    run(tmp_path, "filter", "in", "--out", "wide", "--where", "width > height")
    run(tmp_path, "export", "wide", "--out", "shards")


def run(folder: Path, verb: str, *words: object) -> str:
    """Run a verb on names relative to `folder`, and return what it prints."""
    places = [folder / str(w) if i == 0 or words[i - 1] == "--out" else w for i, w in enumerate(words)]
    result = cli(verb, *places)
    assert result.exit_code == 0, result.output
    return str(result.stdout)
