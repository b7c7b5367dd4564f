"""Bytes to pixels: exact is open_clip's own preprocessing, fast is close to it, limits come before decoding."""

import io
import struct
import sys
import types
import zlib

import numpy as np
import open_clip
import pytest
import simplejpeg
import torch
from PIL import Image

from aligncurate.dataset.record import Status
from aligncurate.errors import ImageError
from aligncurate.images import formats, limits
from aligncurate.images.decode import decode, load_rgb, no_decoder_warnings, open_image
from aligncurate.images.formats import extension
from aligncurate.images.preprocess import Preprocess
from tests.support.inputs import encoded, picture


@pytest.fixture(autouse=True)
def _as_in_a_run():
    with no_decoder_warnings():
        yield


@pytest.fixture(scope="module")
def preprocess() -> Preprocess:
    return make_preprocess()


def make_preprocess(**changes) -> Preprocess:
    config = open_clip.transform.PreprocessCfg(**{"size": 64, **changes})
    return Preprocess.of(open_clip.transform.image_transform_v2(config, is_train=False), vars(config))


def pixels_of(data: bytes, preprocess: Preprocess, mode: str = "exact") -> torch.Tensor:
    """As the encoder gets them: decoded, then normalised."""
    return preprocess.normalize(decode(data, open_image(data)[0], [preprocess], mode)[0])


def plain(data: bytes, preprocess: Preprocess) -> torch.Tensor:
    """What a plain open_clip loop makes of a file."""
    return preprocess.transform(Image.open(io.BytesIO(data)))


def transparent(seed: int) -> Image.Image:
    image = picture(seed, 90, 70, "RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def palette(seed: int) -> Image.Image:
    return picture(seed, 90, 70).quantize(60)


FORMS = {
    "jpeg": encoded(picture(0, 300, 200)),
    "jpeg, portrait": encoded(picture(1, 111, 307)),
    "jpeg, progressive": encoded(picture(2, 120, 90), progressive=True, subsampling=0),
    "jpeg, grey": encoded(picture(3, 120, 90, "L")),
    "jpeg, cmyk": encoded(picture(4, 120, 90, "CMYK")),
    "png": encoded(picture(5, 91, 77), "PNG"),
    "png, smaller than the input": encoded(picture(6, 13, 9), "PNG"),
    "png, alpha": encoded(transparent(7), "PNG"),
    "png, grey and alpha": encoded(transparent(8).convert("LA"), "PNG"),
    "png, palette": encoded(palette(9), "PNG"),
    "png, palette with one transparent colour": encoded(palette(10), "PNG", transparency=3),
    "png, palette with alpha": encoded(palette(11), "PNG", transparency=bytes(range(60))),
    "png, black and white": encoded(picture(12, 90, 70, "1"), "PNG"),
    "png, 1x1": encoded(picture(13, 1, 1), "PNG"),
    "webp": encoded(picture(14, 120, 90), "WEBP"),
    "webp, alpha": encoded(transparent(15), "WEBP"),
    "gif": encoded(picture(16, 120, 90), "GIF"),
    "gif, animated": encoded(picture(17, 60, 60), "GIF", save_all=True, append_images=[picture(18, 60, 60)]),
    "bmp": encoded(picture(19, 50, 60), "BMP"),
    "tiff": encoded(picture(20, 50, 60), "TIFF"),
    "ppm": encoded(picture(21, 50, 60), "PPM"),
}


@pytest.mark.parametrize("name", FORMS)
def test_exact_is_open_clips_own_preprocessing(name, preprocess) -> None:
    found = pixels_of(FORMS[name], preprocess)
    assert found.dtype == torch.float32 and found.shape == (3, 64, 64)
    assert torch.equal(found, plain(FORMS[name], preprocess))


@pytest.mark.parametrize(
    "changes",
    [
        {"resize_mode": "squash"},
        {"resize_mode": "longest"},
        {"size": (48, 64)},
        {"interpolation": "bilinear"},
        {"mean": (0.5,) * 3, "std": (0.5,) * 3},
    ],
)
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_other_preprocessing_configs(changes, mode) -> None:
    other = make_preprocess(**changes)
    data = encoded(picture(3, 150, 100))
    assert torch.allclose(pixels_of(data, other, mode), plain(data, other), atol=0.0 if mode == "exact" else 0.1)


def test_only_the_first_frame_of_an_animation_counts(preprocess) -> None:
    first, second = palette(1), palette(2)
    both = encoded(first, "GIF", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(both)).n_frames == 2
    assert torch.equal(pixels_of(both, preprocess), pixels_of(encoded(first, "GIF"), preprocess))


# How an upright picture must be stored for each EXIF orientation (TIFF 6.0, tag 274).
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def rotated(upright: Image.Image, orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = STORED[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    return encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_undone(orientation, kind, preprocess) -> None:
    upright = picture(1, 90, 60)
    assert open_image(rotated(upright, orientation, kind))[1:] == (90, 60)
    assert load_rgb(rotated(upright, orientation, kind)).tobytes() == upright.tobytes()
    for mode, slack in (("exact", 0.0), ("fast", 0.05)):
        found = pixels_of(rotated(upright, orientation, kind), preprocess, mode)
        assert torch.allclose(found, preprocess.transform(upright), atol=slack)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_of_jpegs(orientation, mode, preprocess) -> None:
    upright = picture(2, 800, 560)
    data = rotated(upright, orientation, "JPEG")
    assert open_image(data)[1:] == (800, 560)
    assert (pixels_of(data, preprocess, mode) - preprocess.transform(upright)).abs().max() < 0.15


def test_broken_exif_does_not_cost_the_image(preprocess) -> None:
    data = encoded(picture(1), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    assert open_image(data)[1:] == (48, 40)
    assert load_rgb(data).size == (48, 40)
    assert torch.equal(pixels_of(data, preprocess), plain(encoded(picture(1)), preprocess))


def test_16_bit_grey_keeps_its_brightness(preprocess) -> None:
    values = np.linspace(0, 65_535, 80 * 60).reshape(60, 80)
    deep = encoded(Image.fromarray(values.astype(np.uint16)), "PNG")
    assert Image.open(io.BytesIO(deep)).mode == "I;16"
    shallow = encoded(Image.fromarray((values / 257).astype(np.uint8)), "PNG")
    found, expected = pixels_of(deep, preprocess), plain(shallow, preprocess)
    assert (found - expected).abs().max() < 2 / 255 / 0.26


@pytest.mark.parametrize("size", [(500, 333), (333, 500), (1_024, 768), (65, 64), (40, 30), (2_000, 80)])
def test_fast_is_close_to_exact(size, preprocess) -> None:
    data = encoded(picture(5, *size), quality=95)
    exact, fast = (pixels_of(data, preprocess, mode) for mode in ("exact", "fast"))
    assert fast.shape == exact.shape and fast.dtype == exact.dtype
    # A unit is one standard deviation of CLIP's images, about 68 of 255 grey steps.
    assert (fast - exact).abs().mean() < 0.03 and (fast - exact).abs().max() < 0.3


@pytest.mark.parametrize("name", [n for n in FORMS if "palette" not in n and "alpha" not in n and "white" not in n])
def test_fast_is_close_to_exact_in_every_format(name, preprocess) -> None:
    difference = (pixels_of(FORMS[name], preprocess, "fast") - plain(FORMS[name], preprocess)).abs()
    assert difference.mean() < 0.1


@pytest.mark.parametrize(
    ("stored", "decoded"),
    [((1_600, 1_200), (200, 150)), ((200, 192), (100, 96)), ((190, 190), (190, 190)), ((100, 90), (100, 90))],
)
def test_fast_decodes_jpegs_at_reduced_size_but_well_above_the_input(stored, decoded, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(Preprocess, "fast", lambda self, rgb, original: seen.append(rgb.shape[1::-1]))
    data = encoded(picture(1, *stored))
    decode(data, open_image(data)[0], [make_preprocess(), make_preprocess(size=32)], "fast")
    assert seen == [decoded] * 2  # decoded once, for the greater of the two encoders


def test_what_the_quick_decoder_refuses_pillow_decodes(preprocess, monkeypatch) -> None:
    refused = []
    real = simplejpeg.decode_jpeg

    def watched(data, *args, **options):
        try:
            return real(data, *args, **options)
        except ValueError:
            refused.append(data)
            raise

    monkeypatch.setattr(simplejpeg, "decode_jpeg", watched)
    odd = FORMS["jpeg"][:-2] + bytes(9) + FORMS["jpeg"][-2:]  # harmless bytes before the end mark
    assert (pixels_of(odd, preprocess, "fast") - plain(odd, preprocess)).abs().mean() < 0.03
    assert refused == [odd]


@pytest.mark.parametrize("size", [(61, 300), (300, 61), (64, 64), (97, 64), (65, 1_000)])
def test_the_middle_is_cut_where_open_clip_cuts_it(size, preprocess) -> None:
    ramp = np.linspace(0, 255, size[0])[None] + np.linspace(0, 255, size[1])[:, None]
    image = Image.fromarray((ramp / 2).astype(np.uint8)).convert("RGB")
    found = preprocess.normalize(preprocess.fast(np.array(image), image.size[::-1]))
    assert (found - preprocess.transform(image)).abs().max() < 1.5 / 255 / 0.26  # one grey step of rounding


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims this size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (9_460, 9_460), (89_478_486, 1), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_before_decoding(size, monkeypatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="89,478,485") as caught:
        open_image(claiming(*size))
    assert caught.value.status is Status.TOO_LARGE


def test_the_largest_image_is_still_opened() -> None:
    assert open_image(claiming(9_459, 9_459))[1:] == (9_459, 9_459)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
def test_shapes_too_narrow_to_resize_are_refused(size, preprocess) -> None:
    with pytest.raises(ImageError, match="too narrow") as caught:
        pixels_of(encoded(picture(0, *size), "PNG"), make_preprocess(size=224))
    assert caught.value.status is Status.TOO_LARGE


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"\n  <html>", "web page"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (b"not found\n", "this is text"),
        (b"\xff\xd8\xff", "JPEG file that is damaged"),
        (bytes(1_000), "not an image"),
        (encoded(picture(), "PNG")[:20], "PNG file that is damaged"),
    ],
)
def test_data_that_is_not_an_image_is_named(data, sentence) -> None:
    with pytest.raises(ImageError, match=sentence) as caught:
        open_image(data)
    assert caught.value.status is Status.DECODE_ERROR


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_truncated_image_is_damaged(kind, mode, preprocess) -> None:
    data = encoded(picture(1, 120, 90), kind)
    with pytest.raises(ImageError) as caught:
        pixels_of(data[: len(data) * 2 // 3], preprocess, mode)
    assert caught.value.status is Status.DECODE_ERROR


def test_random_damage_never_escapes_as_another_error(preprocess) -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        good = np.frombuffer(encoded(picture(1, 32, 24), kind), np.uint8)
        for _ in range(40):
            data = good.copy()
            data[rng.integers(len(data), size=4)] = rng.integers(256, size=4)
            try:
                found = pixels_of(data.tobytes(), preprocess, rng.choice(["exact", "fast"]))
            except ImageError as error:
                assert error.status in (Status.DECODE_ERROR, Status.TOO_LARGE)
            else:
                assert torch.isfinite(found).all()


def test_the_usual_file_ending_is_found() -> None:
    expected = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
    assert {k: extension(encoded(picture(), k)) for k in expected} == expected
    assert extension(b"text") is None


# ---- formats -----------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def test_only_the_listed_formats_are_tried(monkeypatch) -> None:
    tried = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, formats: tried.append(formats) or real(*args, formats=formats))
    with pytest.raises(ImageError, match="PostScript"):
        open_image(EPS)
    assert extension(EPS) is None
    assert {name for names in tried for name in names} == {
        *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "TGA")
    }


@pytest.mark.parametrize("kind", ["EPS", "PDF", "SGI", "IM", "MSP", "PCX", "SPIDER", "XBM", "DDS", "ICNS", "QOI"])
def test_what_pillow_writes_in_other_formats_is_refused(kind) -> None:
    image = picture(1, 64, 64, {"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(kind, "RGB"))
    with pytest.raises(ImageError) as caught:
        open_image(encoded(image, kind))
    assert caught.value.status is Status.DECODE_ERROR


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "ICO", "TGA"])
def test_the_listed_formats_are_read(kind, preprocess) -> None:
    data = encoded(picture(1, 64, 64), kind)
    assert torch.equal(pixels_of(data, preprocess), plain(data, preprocess))
    assert extension(data) is not None


def test_mpo_is_read(preprocess) -> None:
    data = encoded(picture(1), "MPO", save_all=True, append_images=[picture(2)])
    assert open_image(data)[0].format == "MPO"
    assert torch.equal(pixels_of(data, preprocess), plain(data, preprocess))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"%PDF-1.7\n", "PDF"),
        (b"8BPS\0\1", "Photoshop"),
        (b'<?xml version="1.0"?>\n<svg xmlns="">', "SVG"),
        (b"<svg xmlns=''>", "SVG"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "video"),
        (b"\x1a\x45\xdf\xa3" + bytes(20), "video"),
        (b"RIFF\0\0\0\0AVI LIST", "video"),
        (b"\xff\x0a" + bytes(9), "JPEG XL"),
        (b"PK\3\4" + bytes(30), "zip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    ],
)
def test_other_files_are_named(data, name) -> None:
    with pytest.raises(ImageError, match=name):
        open_image(data)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def test_heic_is_named_without_pillow_heif(monkeypatch) -> None:
    formats._has_heif.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"HEIC.*pillow-heif"):
        open_image(HEIC)
    formats._has_heif.cache_clear()


def test_heic_is_read_with_pillow_heif(monkeypatch) -> None:
    def factory(file, name):  # stands in for pillow-heif's own
        return Image.open(io.BytesIO(FORMS["png"]))

    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = lambda: Image.register_open("HEIF", factory, lambda head: head[4:8] == b"ftyp")
    formats._has_heif.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    try:
        assert open_image(HEIC)[1:] == (91, 77)
    finally:
        Image.OPEN.pop("HEIF"), Image.ID.remove("HEIF")
        formats._has_heif.cache_clear()


# ---- bombs -------------------------------------------------------------------------------------------------------


def many_scans(count: int, size: int = 64) -> bytes:
    data = encoded(picture(1, size, size), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (count - 10) + b"\xff\xd9"


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_scans_are_counted_before_decoding(mode, preprocess, monkeypatch) -> None:
    assert pixels_of(many_scans(100), preprocess, mode).shape == (3, 64, 64)
    bomb = many_scans(1_000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"1,000 scans.*100") as caught:
        open_image(bomb)
    assert caught.value.status is Status.TOO_LARGE


def test_a_large_jpeg_may_have_fewer_scans(monkeypatch) -> None:
    monkeypatch.setattr(limits, "MAX_PIXELS", 100 * 100)
    assert open_image(many_scans(20, 96))[1:] == (96, 96)
    with pytest.raises(ImageError, match="40 scans"):
        open_image(many_scans(40, 96))


def test_thumbnails_in_segments_are_not_counted() -> None:
    data = encoded(picture(1))
    segment = b"\xff\xed" + struct.pack(">H", 2 + 400) + b"\xff\xda" * 200
    assert open_image(data[:2] + segment + data[2:])[1:] == (48, 40)


def test_a_jpeg_2000_with_another_size_inside_is_refused() -> None:
    data = bytearray(encoded(picture(1), "JPEG2000"))
    place = data.index(b"\xff\x4f\xff\x51")
    data[place + 8 : place + 16] = struct.pack(">2I", 60_000, 60_000)
    with pytest.raises(ImageError, match="60000x60000") as caught:
        open_image(bytes(data))
    assert caught.value.status is Status.TOO_LARGE


def overlapping_tags(entries: int, size: int) -> bytes:
    """A TIFF directory whose tags are all the same bytes."""
    tags = b"".join(struct.pack("<HHII", 30_000 + n, 7, size, 8) for n in range(entries))
    return b"II*\0" + struct.pack("<I", 8 + size) + bytes(size) + struct.pack("<H", entries) + tags + bytes(4)


def test_a_tiff_with_overlapping_tags_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *args, **options: pytest.fail("opened"))
    with pytest.raises(ImageError, match="again and again") as caught:
        open_image(overlapping_tags(30_000, 200_000))
    assert caught.value.status is Status.TOO_LARGE


def test_exif_with_overlapping_tags_says_nothing_of_the_rotation(monkeypatch) -> None:
    data = encoded(picture(1), "WEBP", exif=b"Exif\0\0" + overlapping_tags(30_000, 200_000))
    monkeypatch.setattr(Image.Exif, "load", lambda *args: pytest.fail("read"))
    assert open_image(data)[1:] == (48, 40)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@pytest.mark.parametrize(
    "text",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2_000_000))),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(bytes(2_000_000))),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(200_000_000), 1)),
        chunk(b"tEXt", b"workflow\0" + b"x" * 2_000_000) * 40,
    ],
)
@pytest.mark.parametrize("behind", [False, True])
def test_a_png_with_large_texts_is_ok(text, behind, preprocess) -> None:
    data = FORMS["png"]
    place = len(data) - 12 if behind else 33
    assert torch.equal(pixels_of(data[:place] + text + data[place:], preprocess), plain(data, preprocess))


def test_a_webp_that_is_cut_off_is_said_to_be() -> None:
    data = FORMS["webp"]
    with pytest.raises(ImageError, match=f"cut off: it has {len(data) // 2:,} of {len(data):,} bytes"):
        open_image(data[: len(data) // 2])


# ---- modes -------------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 80 * 60, dtype=np.float32).reshape(60, 80)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize(
    ("values", "grey"),
    [
        (RAMP, RAMP * 255),
        (RAMP * 255, RAMP * 255),
        ((RAMP * 255).astype(np.int32), RAMP * 255),
        ((RAMP * 65_535).astype(np.int32), RAMP * 255),
        ((RAMP * 65_535).astype(np.uint16), RAMP * 255),
    ],
)
def test_deep_images_keep_their_brightness(values, grey, mode, preprocess) -> None:
    found = pixels_of(encoded(Image.fromarray(values), "TIFF"), preprocess, mode)
    expected = plain(encoded(Image.fromarray(grey.astype(np.uint8)), "PNG"), preprocess)
    assert (found - expected).abs().max() < 3 / 255 / 0.26


@pytest.mark.parametrize(
    ("values", "range"),
    [
        (RAMP * 900, "0 to 900"),
        (RAMP - 0.5, "-0.5 to 0.5"),
        (np.full((9, 9), np.nan, np.float32), "nan to nan"),
        (np.full((9, 9), 70_000, np.int32), "70000 to 70000"),
    ],
)
def test_pixels_of_an_unknown_scale_are_refused(values, range, preprocess) -> None:
    with pytest.raises(ImageError, match=f"pixels from {range}: their scale is unknown") as caught:
        pixels_of(encoded(Image.fromarray(values), "TIFF"), preprocess)
    assert caught.value.status is Status.DECODE_ERROR


def test_twelve_bits_keep_their_brightness() -> None:
    values = np.arange(0, 4_096, 64)  # two pixels in three bytes, the high bits first
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1)
    tags = [(256, 64), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 96)]
    directory = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    start = struct.pack("<4sI", b"II*\0", 8 + 96)
    data = start + packed.astype(np.uint8).tobytes() + struct.pack("<H", len(tags)) + directory + bytes(4)
    assert np.array_equal(np.asarray(load_rgb(data))[0, :, 0], values >> 4)


@pytest.mark.parametrize("mode", ["CMYK", "LA", "1", "YCbCr", "P", "RGBA", "L"])
def test_tiffs_of_every_mode_are_as_in_open_clip(mode, preprocess) -> None:
    data = encoded(picture(1, 80, 60).convert(mode), "TIFF")
    assert torch.equal(pixels_of(data, preprocess), plain(data, preprocess))


def test_a_lab_image_is_refused_with_a_true_sentence(preprocess) -> None:
    lab = Image.merge("LAB", picture(1).split())
    for decoder in (load_rgb, lambda data: pixels_of(data, preprocess)):
        with pytest.raises(ImageError, match="CIELAB"):
            decoder(encoded(lab, "TIFF"))


def test_any_exception_of_a_decoder_or_of_exif_becomes_the_status(preprocess, monkeypatch) -> None:
    for error in (MemoryError(), RecursionError(), AttributeError("x"), EOFError(), OverflowError(), AssertionError()):

        def fail(*args: object, error: Exception = error) -> None:
            raise error

        data = encoded(picture(1), "PNG", exif=Image.Exif())
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "load", fail)
            patch.setattr("PIL.ImageFile.ImageFile.load", fail)
            with pytest.raises(ImageError, match="damaged"):
                pixels_of(data, preprocess)
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "getexif", fail)
            assert open_image(FORMS["jpeg"])[1:] == (300, 200)
