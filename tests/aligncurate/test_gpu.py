"""`--decode gpu`: its code runs here on the CPU's decoder, and on a GPU where there is one."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import aligncurate
from aligncurate.errors import UserError
from aligncurate.images import gpu
from aligncurate.images.decode import no_decoder_warnings, open_image
from aligncurate.verbs import score as scoring
from tests.aligncurate.images.test_images import make_preprocess, pixels_of, rotated
from tests.support.inputs import encoded, jpeg, picture, write_tar


def on_gpu(data: bytes, **changes) -> bool:
    return gpu.decodable(data, open_image(data)[0], [make_preprocess(**changes)])


def test_only_whole_upright_jpegs_go_to_the_gpu() -> None:
    assert on_gpu(jpeg()) and on_gpu(encoded(picture(mode="L"))) and on_gpu(jpeg() + bytes(7))
    assert not on_gpu(jpeg()[:-40])
    assert not on_gpu(encoded(picture(), "PNG"))
    assert not on_gpu(encoded(picture(mode="CMYK")))
    assert not on_gpu(rotated(picture(), 6, "JPEG"))
    assert not on_gpu(jpeg(), resize_mode="squash")


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ])],
)  # fmt: skip
def test_pixels_are_close_to_the_exact_ones(device) -> None:
    preprocesses = [make_preprocess(), make_preprocess(size=32, interpolation="bilinear")]
    files = [encoded(picture(n, *size), quality=95) for n, size in enumerate([(200, 150), (64, 64), (90, 300)])]
    files.append(encoded(picture(4, 120, 90, "L")))
    with no_decoder_warnings():
        found = gpu.decode_jpegs(files, preprocesses, torch.device(device))
    for data, pixels in zip(files, found, strict=True):
        for preprocess, own in zip(preprocesses, pixels, strict=True):
            assert own.dtype == torch.uint8 and own.device.type == device
            difference = (preprocess.normalize(own.cpu()) - pixels_of(data, preprocess)).abs()
            assert difference.mean() < 0.03 and difference.max() < 0.2


def test_without_a_gpu_it_is_refused(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", {"a": {"jpg": jpeg(), "txt": b"a"}})
    with pytest.raises(UserError, match="needs a CUDA device"):
        aligncurate.score(tmp_path / "a.tar", tmp_path / "out", model="tiny", device="cpu", decode="gpu", quiet=True)


def damaged() -> bytes:
    """A JPEG whose first Huffman table is impossible."""
    good = encoded(picture(1, 300, 200), quality=95)
    table = good.index(b"\xff\xc4") + 5
    return good[:table] + b"\xff" * 16 + good[table + 16 :]


def test_statuses_are_those_of_exact_decoding_and_scores_are_close(tmp_path, monkeypatch) -> None:
    samples = {f"s{i}": {"jpg": jpeg(i, width=300, height=200), "txt": f"a red circle {i}".encode()} for i in range(6)}
    samples["png"] = {"png": encoded(picture(7), "PNG"), "txt": b"a blue square"}
    samples["turned"] = {"jpg": rotated(picture(8, 300, 200), 6, "JPEG"), "txt": b"a square"}
    samples["cut"] = {"jpg": jpeg(9)[:-300], "txt": b"a square"}
    samples["damaged"] = {"jpg": damaged(), "txt": b"a square"}
    samples["page"] = {"jpg": b"<html>", "txt": b"a square"}
    with pytest.raises(OSError):  # what the oracle says of it
        Image.open(io.BytesIO(damaged())).load()
    tar = write_tar(tmp_path / "pairs.tar", samples)
    exact = aligncurate.score(tar, tmp_path / "exact", model="tiny", quiet=True).dataset.scan().collect()
    monkeypatch.setattr(scoring, "check_decode", lambda options, encoder: None)
    run = aligncurate.score(tar, tmp_path / "gpu", model="tiny", decode="gpu", quiet=True).dataset
    found = run.scan().collect()
    columns = ["key", "status", "error", "width", "height", "sha256"]
    assert found.select(columns).equals(exact.select(columns))
    np.testing.assert_allclose(found["score"].drop_nulls(), exact["score"].drop_nulls(), atol=0.03)
    assert found["score"].is_null().to_list() == exact["score"].is_null().to_list()
    assert run.parts[0].facts["fast_against_exact"]["pairs"] == 8
