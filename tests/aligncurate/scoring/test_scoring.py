"""Scores against a plain open_clip loop; batches, embeddings, limits and retries."""

import csv
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import aligncurate
from aligncurate.encoders import load as encoders
from aligncurate.errors import UserError
from aligncurate.io import storage
from aligncurate.sources.options import SourceOptions
from aligncurate.verbs import score as scoring
from tests.support.inputs import cli, write_tar


@pytest.fixture(scope="module")
def flickr_clip(data_root: Path) -> dict[str, Path]:
    folder = data_root / "flickr-clip"
    return {"model_config": folder / "flickr-clip.json", "pretrained": folder / "flickr-clip.safetensors"}


@pytest.fixture(scope="module")
def plain(flickr_clip):
    """A plain open_clip loop, written as its documentation does: embeds images and texts in fp32."""
    open_clip.add_model_config(str(flickr_clip["model_config"]))
    model, _, preprocess = open_clip.create_model_and_transforms(
        "flickr-clip", pretrained=str(flickr_clip["pretrained"]), precision="fp32"
    )
    tokenizer = open_clip.get_tokenizer("flickr-clip")
    model.eval()

    @torch.no_grad()
    def images(data: list[bytes]) -> torch.Tensor:
        found = []
        for i in range(0, len(data), 50):
            pixels = torch.stack([preprocess(Image.open(io.BytesIO(d))) for d in data[i : i + 50]])
            features = model.encode_image(pixels)
            found.append(features / features.norm(dim=-1, keepdim=True))
        return torch.cat(found)

    @torch.no_grad()
    def texts(captions: list[str]) -> torch.Tensor:
        found = []
        for i in range(0, len(captions), 50):
            features = model.encode_text(tokenizer(captions[i : i + 50]))
            found.append(features / features.norm(dim=-1, keepdim=True))
        return torch.cat(found)

    return images, texts


@pytest.fixture(scope="module")
def dev(data_root: Path) -> list[tuple[str, bytes, str]]:
    """(key, image bytes, caption) of the Flickr8k dev tar, read with nothing but tarfile."""
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(data_root / "flickr8k/dev-00000.tar") as tar:
        for member in tar:
            key, ending = member.name.split(".", 1)
            members.setdefault(key, {})[ending] = tar.extractfile(member).read()
    return [(key, m["jpg"], m["txt"].decode()) for key, m in members.items()]


def auc(right: np.ndarray, wrong: np.ndarray) -> float:
    """Share of all pairs (right, wrong) in which the right one scores higher; ties count half."""
    order = np.sort(wrong)
    below = np.searchsorted(order, right, "left")
    equal = np.searchsorted(order, right, "right") - below
    return float((below + equal / 2).sum() / (len(right) * len(wrong)))


def test_scores_and_auc_equal_the_plain_loop(tmp_path, data_root, flickr_clip, plain, dev) -> None:
    images, texts = plain
    features = images([image for _, image, _ in dev])
    own = texts([caption for _, _, caption in dev])
    expected = (features * own).sum(-1).numpy()
    tar = data_root / "flickr8k/dev-00000.tar"
    scored = aligncurate.score(tar, tmp_path / "own", **flickr_clip, precision="fp32", quiet=True).dataset
    found = scored.scan().select("key", "score", "status").collect()
    assert found["key"].to_list() == [key for key, _, _ in dev]
    assert set(found["status"]) == {"ok"}
    np.testing.assert_allclose(found["score"].to_numpy(), expected, atol=1e-5, rtol=0)

    # The caption of the 17th next image, through a table whose images lie in the tar.
    with (tmp_path / "others.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i, (key, _, _) in enumerate(dev):
            writer.writerow([f"{key}.jpg", dev[(i + 17) % len(dev)][2]])
    options = SourceOptions(image_root=str(data_root / "flickr8k"))
    others = aligncurate.score(tmp_path / "others.csv", tmp_path / "others", **flickr_clip, source=options, quiet=True)
    wrong = others.dataset.scan().select("score").collect()["score"].to_numpy()
    np.testing.assert_allclose(wrong, (features * own.roll(-17, 0)).sum(-1).numpy(), atol=1e-5, rtol=0)
    assert auc(found["score"].to_numpy(), wrong) == pytest.approx(auc(expected, wrong), abs=1e-4)
    assert auc(expected, wrong) == pytest.approx(0.7893, abs=1e-3)  # as the data's own notes say


def test_bf16_stays_within_its_bound(tmp_path, data_root, flickr_clip, plain, dev) -> None:
    images, texts = plain
    expected = (images([d[1] for d in dev[:96]]) * texts([d[2] for d in dev[:96]])).sum(-1).numpy()
    run = aligncurate.score(
        data_root / "flickr8k/dev-00000.tar", tmp_path / "out", **flickr_clip, precision="bf16", limit=96, quiet=True
    )
    scores = run.dataset.scan().select("score").collect()["score"].to_numpy()
    assert run.dataset.manifest["encoder"]["precision"] == "bf16"
    change = np.abs(scores - expected)
    assert change.mean() < 2e-3
    assert np.quantile(change, 0.95) < 5e-3
    assert change.max() < 1e-2


def test_fast_decoding_says_how_far_it_strays(tmp_path, data_root, flickr_clip) -> None:
    exact, fast = (
        aligncurate.score(data_root / "coco", tmp_path / mode, **flickr_clip, limit=80, decode=mode, quiet=True).dataset
        for mode in ("exact", "fast")
    )
    change = np.abs(exact.read(0, ["score"])["score"].to_numpy() - fast.read(0, ["score"])["score"].to_numpy())
    noted = fast.parts[0].facts["fast_against_exact"]
    assert noted["pairs"] == 64
    assert noted["mean"] == pytest.approx(float(change[:64].mean()), abs=1e-6)
    assert noted["max"] == pytest.approx(float(change[:64].max()), abs=1e-6)
    assert 0 < noted["mean"] < 0.02
    assert "fast_against_exact" not in exact.parts[0].facts


def test_conversations_are_scored_by_the_chosen_turns(tmp_path, data_root, flickr_clip, plain) -> None:
    images, texts = plain
    rows = json.loads((data_root / "daquar/llava_train.json").read_text())[:12]
    data = images([(data_root / "daquar" / row["image"]).read_bytes() for row in rows])
    for which, speakers in {"assistant": {"gpt"}, "user": {"human"}, "all": {"gpt", "human"}}.items():
        joined = [
            " ".join(t["value"].replace("<image>", "").strip() for t in row["conversations"] if t["from"] in speakers)
            for row in rows
        ]
        run = aligncurate.score(
            data_root / "daquar/llava_train.json",
            tmp_path / which,
            **flickr_clip,
            score_text=which,
            limit=12,
            quiet=True,
        )
        scores = run.dataset.scan().select("score").collect()["score"].to_numpy()
        np.testing.assert_allclose(scores, (data * texts(joined)).sum(-1).numpy(), atol=1e-5, rtol=0)


def test_embeddings_give_the_scores(tmp_path, data_root, flickr_clip) -> None:
    run = aligncurate.score(
        data_root / "flickr8k/dev-00000.tar", tmp_path / "out", **flickr_clip, embeddings="fp16", limit=40, quiet=True
    )
    table = pq.read_table(run.dataset.files[0])
    image, text = (np.array(table[f"{kind}_embedding"].to_pylist(), np.float32) for kind in ("image", "text"))
    assert image.shape == (40, 192)
    np.testing.assert_allclose((image * text).sum(-1), table["score"].to_numpy(), atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batch_size_does_not_change_scores(tmp_path, data_root, flickr_clip, plain, dev, batch) -> None:
    images, texts = plain
    expected = (images([d[1] for d in dev[:50]]) * texts([d[2] for d in dev[:50]])).sum(-1).numpy()
    tar = data_root / "flickr8k/dev-00000.tar"
    run = aligncurate.score(tar, tmp_path / "out", **flickr_clip, batch_size=batch, limit=50, workers=3, quiet=True)
    np.testing.assert_allclose(run.dataset.scan().collect()["score"].to_numpy(), expected, atol=1e-5, rtol=0)


def test_limit_counts_over_shards(tmp_path, data_root) -> None:
    tars = [str(data_root / f"flickr8k/{name}-00000.tar") for name in ("dev", "test", "train")]
    run = aligncurate.ingest(tars, tmp_path / "out", limit=1_250, quiet=True)
    assert [part.rows for part in run.dataset.parts] == [1_000, 250]


def test_long_captions_are_cut_at_the_context_as_open_clip_cuts_them(plain, flickr_clip) -> None:
    encoder = encoders.load(**flickr_clip)
    long = "a dog and a cat run over the green grass " * 2_500  # 100,000 characters
    endless = "woof" * 25_000
    for text in (long, endless, "", "  \n "):
        open_clip_ids = open_clip.get_tokenizer("flickr-clip")([text])
        assert torch.equal(encoder.tokenize([text]), open_clip_ids)


def test_retry_errors_does_only_the_failed_rows(tmp_path, dev) -> None:
    good = {key: {"jpg": image, "txt": caption.encode()} for key, image, caption in dev[:6]}
    broken = {k: dict(v) for k, v in good.items()}
    key = list(good)[2]
    broken[key]["jpg"] = b"<html>not found</html>".ljust(len(good[key]["jpg"]))
    tar = write_tar(tmp_path / "pairs.tar", broken)
    first = aligncurate.score(tar, tmp_path / "out", model="tiny", quiet=True).dataset
    assert first.statuses == {"ok": 5, "decode_error": 1}
    again = aligncurate.score(tar, tmp_path / "out", model="tiny", quiet=True)
    assert again.rows == 0 and again.resumed == 1

    write_tar(tar, good)
    retried = aligncurate.score(tar, tmp_path / "out", model="tiny", retry_errors=True, quiet=True).dataset
    assert retried.statuses == {"ok": 6}
    whole = aligncurate.score(tar, tmp_path / "whole", model="tiny", quiet=True).dataset
    np.testing.assert_allclose(
        retried.scan().collect()["score"].to_numpy(), whole.scan().collect()["score"].to_numpy(), atol=1e-6
    )
    same = [name for name in whole.schema.names if name != "score"]
    assert retried.scan().select(same).collect().equals(whole.scan().select(same).collect())


def rows_of(dataset) -> dict[str, dict]:
    return {row["key"]: row for row in dataset.scan().collect().iter_rows(named=True)}


def test_several_encoders_share_one_pass(tmp_path, data_root, flickr_clip, monkeypatch, capsys) -> None:
    tar = data_root / "flickr8k/dev-00000.tar"
    config, weights = flickr_clip["model_config"], flickr_clip["pretrained"]
    alone = aligncurate.score(tar, tmp_path / "flickr", **flickr_clip, limit=40, quiet=True).dataset
    tiny = aligncurate.score(tar, tmp_path / "tiny", model="tiny", limit=40, quiet=True).dataset
    decoded = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **o: (decoded.append(1), real(*a, **o))[1])
    both = aligncurate.score(
        tar, tmp_path / "both", model="tiny,flickr-clip", pretrained=f",{weights}", model_config=[config],
        limit=40, quiet=True,
    ).dataset  # fmt: skip
    assert len(decoded) == 40
    found = both.scan().collect()
    assert found["score"].equals(tiny.scan().collect()["score"])
    assert found["score_flickr-clip"].equals(alone.scan().collect()["score"].rename("score_flickr-clip"))
    assert both.manifest["encoder"] == tiny.manifest["encoder"]
    assert both.manifest["encoders"] == {
        "score": tiny.manifest["encoder"], "score_flickr-clip": alone.manifest["encoder"]
    }  # fmt: skip
    levelled = aligncurate.bucket(both, tmp_path / "levels", score_column="score_flickr-clip", levels=4, quiet=True)
    assert set(levelled.scan().collect()["level"]) == {1, 2, 3, 4}
    # Thresholds name the encoder of their scores, also after another verb; a note tells when it is another one.
    assert levelled.manifest["encoders"] == both.manifest["encoders"]
    assert levelled.manifest["thresholds"]["encoder"]["model"] == alone.manifest["encoder"]["model"]
    column = {"score_column": "score_flickr-clip", "quiet": False}
    aligncurate.bucket(levelled, tmp_path / "same", thresholds=levelled.path, **column)
    assert "the thresholds are for scores of" not in capsys.readouterr().err
    file = json.loads((levelled.path / "thresholds.json").read_text())
    file["encoder"]["weights_sha256"] = "0" * 64
    (tmp_path / "thresholds.json").write_text(json.dumps(file))
    aligncurate.bucket(levelled, tmp_path / "other", thresholds=tmp_path / "thresholds.json", **column)
    assert "the thresholds are for scores of" in capsys.readouterr().err.replace("\n", " ")


def test_a_retry_keeps_and_completes_all_scores_and_their_counts(tmp_path, dev, flickr_clip) -> None:
    good = {key: {"jpg": image, "txt": caption.encode()} for key, image, caption in dev[:6]}
    broken = {k: dict(v) for k, v in good.items()}
    key = list(good)[2]
    broken[key]["jpg"] = b"<html>not found</html>".ljust(len(good[key]["jpg"]))
    tar = write_tar(tmp_path / "pairs.tar", broken)
    options = {
        "model": "tiny,flickr-clip", "pretrained": f",{flickr_clip['pretrained']}",
        "model_config": flickr_clip["model_config"], "quiet": True,
    }  # fmt: skip
    first = aligncurate.score(tar, tmp_path / "out", **options).dataset
    before = rows_of(first)
    assert before[key]["score_flickr-clip"] is None and before[key]["score"] is None
    assert counted(first) == 5
    write_tar(tar, good)
    after = aligncurate.score(tar, tmp_path / "out", **options, retry_errors=True).dataset
    assert counted(after) == 6
    whole = rows_of(aligncurate.score(tar, tmp_path / "whole", **options).dataset)
    for name, row in rows_of(after).items():
        for column in ("score", "score_flickr-clip"):
            assert row[column] == pytest.approx(whole[name][column], abs=1e-6)
            assert name == key or row[column] == before[name][column]


def counted(dataset) -> int:
    """How many scores the manifest counts; checks the counts against the scores."""
    columns = [n for n in dataset.schema.names if n == "score" or n.startswith("score_")]
    assert list(dataset.manifest["score_counts"]) == columns
    for column in columns:
        scores = dataset.scan().collect()[column].drop_nulls().to_numpy()
        halves, expected = np.unique(scores.view(np.uint32) >> 16, return_counts=True)
        # Bits of positive floats ascend, of negative ones descend; keys put the negative ones first.
        keys = [int(h) + 0x8000 if h < 0x8000 else 0xFFFF - int(h) for h in halves]
        found = dataset.manifest["score_counts"][column]
        assert dict(zip(found["bins"], found["counts"], strict=True)) == dict(zip(keys, expected.tolist(), strict=True))
    return sum(dataset.manifest["score_counts"]["score"]["counts"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "tiny,tiny,tiny"}, "tiny is named twice"),
        ({"model": "tiny,ViT-B-32", "pretrained": "openai"}, "1 for 2 models"),
        ({"model": "tiny,ViT-B-32", "pretrained": ","}, "choose its weights"),
    ],
)
def test_mistakes_with_several_encoders_are_named(tmp_path, data_root, options, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        aligncurate.score(data_root / "coco", tmp_path / "out", **options, quiet=True)


def test_the_summary_says_where_the_time_went(tmp_path, dev) -> None:
    tar = write_tar(tmp_path / "a.tar", {k: {"jpg": i, "txt": c.encode()} for k, i, c in dev[:40]})
    scored = aligncurate.score(tar, tmp_path / "scored", model="tiny", workers=2, quiet=True)
    assert list(scored.times.seconds) == ["read", "decode", "tokenize", "copy", "encode", "write"]
    assert all(seconds >= 0 for seconds in scored.times.seconds.values()) and scored.times.seconds["decode"] > 0
    assert scored.times.bottleneck == max(scored.times.busy, key=scored.times.busy.get)
    assert all(0 <= share <= 1.01 for share in scored.times.busy.values())
    ingested = aligncurate.ingest(tar, tmp_path / "ingested", quiet=True)
    assert list(ingested.times.seconds) == ["read", "decode", "write"]
    told = cli("score", tar, "--out", tmp_path / "told", "--model", "tiny").stdout
    assert re.search(
        r"^time: read [\d.]+ s, decode .*, write [\d.]+ s; bottleneck: \w+, \d+%.* busy$", told, re.MULTILINE
    )


def test_an_unfinished_run_keeps_the_batch_size_that_it_chose(tmp_path, dev, monkeypatch) -> None:
    tar = write_tar(tmp_path / "a.tar", {k: {"jpg": i, "txt": c.encode()} for k, i, c in dev[:4]})
    monkeypatch.setattr(scoring, "default_batch", lambda encoder: 5)
    aligncurate.score(tar, tmp_path / "out", model="tiny", quiet=True)
    monkeypatch.setattr(scoring, "default_batch", lambda encoder: 9)  # as if the GPU had more room now
    again = aligncurate.score(tar, tmp_path / "out", model="tiny", quiet=True)
    assert again.dataset.manifest["options"]["batch_size"] == 5 and again.resumed == 1


def test_a_dataset_can_be_scored_later(tmp_path, data_root, flickr_clip) -> None:
    tar = data_root / "flickr8k/dev-00000.tar"
    aligncurate.ingest(tar, tmp_path / "ingested", limit=30, quiet=True)
    later = aligncurate.score(tmp_path / "ingested", tmp_path / "later", **flickr_clip, quiet=True).dataset
    at_once = aligncurate.score(tar, tmp_path / "once", **flickr_clip, limit=30, quiet=True).dataset
    assert later.scan().collect().equals(at_once.scan().collect())


def test_one_shard_that_cannot_be_read_does_not_stop_the_others(tmp_path, dev, monkeypatch) -> None:
    for name, some in {"a": dev[:3], "b": dev[:1]}.items():
        write_tar(tmp_path / f"{name}.tar", {k: {"jpg": i, "txt": c.encode()} for k, i, c in some})
    real = storage.open_file

    def fails(uri: str):
        if uri.endswith("b.tar"):
            raise OSError(5, "Input/output error", uri)
        return real(uri)

    tars = [tmp_path / "a.tar", tmp_path / "b.tar"]
    with monkeypatch.context() as patch:
        patch.setattr(storage, "open_file", fails)
        run = aligncurate.ingest(tars, tmp_path / "out", quiet=True)
    assert run.dataset is None
    assert [(Path(f.shard).name, "Input/output error" in f.error) for f in run.failures] == [("b.tar", True)]
    with pytest.raises(UserError, match="not finished"):
        aligncurate.open_dataset(tmp_path / "out")
    assert aligncurate.ingest(tars, tmp_path / "out", quiet=True).dataset.rows == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "ViT-B-33"}, "did you mean ViT-B-32"),
        ({"model": "ViT-B-32"}, "choose its weights with --pretrained"),
        ({"model": "ViT-B-32", "pretrained": "laion9b"}, "no such weights"),
        ({"model": "ViT-B-32", "pretrained": "/nowhere/weights.bin"}, "no such weights file"),
        ({"model_config": "/nowhere/config.json"}, "no such file"),
        ({"model": "tiny", "device": "cuda:99"}, "no such GPU"),
        ({"model": "tiny", "device": "gpu"}, "use auto, cpu, cuda"),
        ({"model": "tiny", "batch_size": 0}, "--batch-size 0"),
        ({"model": "tiny", "limit": 0}, "--limit 0"),
    ],
)
def test_mistakes_in_options_are_named(tmp_path, data_root, options, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        aligncurate.score(data_root / "coco", tmp_path / "out", **options, quiet=True)
    assert not (tmp_path / "out").exists()
