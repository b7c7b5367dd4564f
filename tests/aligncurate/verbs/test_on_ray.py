"""`score` and `ingest` over a Ray cluster write what one process writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aligncurate.demo.scenes import write_tars
from aligncurate.errors import UserError
from aligncurate.verbs.ingest import ingest
from aligncurate.verbs.score import score
from tests.support.ray_cluster import ray_cluster

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster() as made:
        yield made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.parquet"))}


@pytest.mark.parametrize(
    ("verb", "options"),
    [(score, {"model_config": "mini-clip.json", "pretrained": "mini-clip.safetensors"}), (ingest, {})],
)
def test_the_same_bytes_as_in_one_process(cluster, mini, tmp_path, monkeypatch, verb, options) -> None:
    monkeypatch.chdir(tmp_path)  # relative paths mean the same in actors
    for file in mini.values():
        shutil.copy(file, tmp_path)
    write_tars(Path("pairs"), 100, seed=21, shard_size=20)
    Path("pairs/00002.tar").write_bytes(b"")
    alone = verb("pairs", "alone", quiet=True, allow_missing=1, **options)
    ray = {"engine": "ray", "quiet": True, **options}
    first = verb("pairs", "on_ray", concurrency=2, partition="2/2", **ray)
    assert (first.rows, first.dataset, first.failures) == (40, None, [])
    second = verb("pairs", "on_ray", **ray)  # as many actors as there are places
    assert (second.rows, second.resumed, second.dataset, len(second.failures)) == (40, 2, None, 1)
    assert "00002.tar" in second.failures[0].error
    third = verb("pairs", "on_ray", allow_missing=1, **ray)
    assert third.dataset.rows == alone.dataset.rows == 81
    assert contents(Path("on_ray")) == contents(Path("alone"))
    manifests = [json.loads(Path(name, "manifest.json").read_text()) for name in ("alone", "on_ray")]
    assert manifests[0] == manifests[1] and manifests[0]["complete"]


def test_devices_are_of_one_machine(tmp_path) -> None:
    write_tars(tmp_path / "pairs", 2, seed=21, shard_size=2)
    with pytest.raises(UserError, match="--num-gpus and --concurrency"):
        score(tmp_path / "pairs", tmp_path / "out", model="tiny", quiet=True, engine="ray", devices="0,1")
