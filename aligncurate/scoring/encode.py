"""A window, the consecutive pairs that go through the encoders together: load it, encode it, store its scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aligncurate.dataset.record import Status
from aligncurate.errors import ImageError
from aligncurate.images import gpu
from aligncurate.images.decode import decode, open_image
from aligncurate.scoring.fast_against_exact import add_comparison
from aligncurate.scoring.prepare import PreparedPair
from aligncurate.scoring.timing import StageClock

if TYPE_CHECKING:
    from torch import Tensor

    from aligncurate.encoders.load import Encoder

_JPEGS_PER_CALL = 128  # that a GPU decodes at once


@dataclass
class Window:
    """Consecutive pairs of a shard, and the tensors of those to encode.

    Attributes:
        pairs: all of them; those that cannot be scored are only written.
        encoded: those that go through the encoders, n of them.
        pixels: [n, 3, H, W] per kind of preprocessing, on the device.
        tokens: int64 [n, context] per encoder.
        compared: indices into `encoded` of pairs that were decoded exactly too.
        exact_pixels: their exact pixels.
    """

    pairs: list[PreparedPair]
    encoded: list[PreparedPair]
    pixels: list[Tensor]
    tokens: list[Tensor]
    compared: list[int]
    exact_pixels: Tensor | None


@dataclass
class Embeddings:
    """A window's unit embeddings: (images, texts) per encoder, and the first encoder's of the exact images."""

    each: list[tuple[Tensor, Tensor]]
    exact_images: Tensor | None


class WindowEncoder:
    """The encoders of a run, with what they share.

    Args:
        encoders: by the column for their scores.
        clock: measures each stage.
    """

    def __init__(self, encoders: Mapping[str, Encoder], clock: StageClock) -> None:
        self.columns, self._encoders, self._clock = list(encoders), list(encoders.values()), clock
        kinds = {e.preprocess.pixels_id: e.preprocess for e in self._encoders}
        self.preprocesses = list(kinds.values())
        """Each kind of preprocessing once: encoders may take the same pixels."""
        self._kind = [list(kinds).index(e.preprocess.pixels_id) for e in self._encoders]

    @property
    def smallest_batch(self) -> int | None:
        """The smallest batch size that memory left to an encoder; None without encoders."""
        return min((encoder.towers.batch for encoder in self._encoders), default=None)

    def load(self, pairs: list[PreparedPair]) -> Window:
        """Tokenize, and bring pixels to the device."""
        jpegs = [pair for pair in pairs if pair.jpeg is not None]
        for start in range(0, len(jpegs), _JPEGS_PER_CALL):
            with self._clock.stage("decode"):
                self._decode_on_gpu(jpegs[start : start + _JPEGS_PER_CALL])
        encoded = [pair for pair in pairs if pair.pixels is not None]
        if not encoded:
            return Window(pairs, [], [], [], [], None)
        import torch

        with self._clock.stage("tokenize"):
            texts = [pair.text for pair in encoded]
            tokens = [encoder.tokenize(texts) for encoder in self._encoders]
        with self._clock.stage("copy"):
            upload = self._encoders[0].towers.upload
            each = [pair.pixels for pair in encoded if pair.pixels is not None]
            pixels = [upload([tensors[kind] for tensors in each]) for kind in range(len(self.preprocesses))]
            exact = {i: pair.exact_pixels for i, pair in enumerate(encoded) if pair.exact_pixels is not None}
            exact_pixels = torch.stack(list(exact.values())) if exact else None
        for pair in encoded:
            pair.pixels = pair.exact_pixels = None
        return Window(pairs, encoded, pixels, tokens, list(exact), exact_pixels)

    def _decode_on_gpu(self, pairs: list[PreparedPair]) -> None:
        """Decode JPEGs; if the GPU refuses one of them, the CPU decodes them all and finds out which."""
        files = [pair.jpeg for pair in pairs if pair.jpeg is not None]
        try:
            decoded = gpu.decode_jpegs(files, self.preprocesses, self._encoders[0].device)
        except RuntimeError:
            decoded = []
        for number, (prepared, data) in enumerate(zip(pairs, files, strict=True)):
            prepared.jpeg = None
            if decoded:
                prepared.pixels = decoded[number]
                continue
            try:
                prepared.pixels = decode(data, open_image(data)[0], self.preprocesses, "fast")
            except ImageError as error:
                prepared.pair.fail(Status(error.status), str(error))
                prepared.exact_pixels = None

    def encode(self, window: Window) -> Embeddings:
        """Run the encoders. For one thread only, so that the device has one batch at a time."""
        if not window.encoded:
            return Embeddings([], None)
        with self._clock.stage("encode"):
            each = [
                encoder.embed(window.pixels[kind], tokens)
                for encoder, kind, tokens in zip(self._encoders, self._kind, window.tokens, strict=True)
            ]
            exact_images = None
            if window.exact_pixels is not None:
                exact_images, _ = self._encoders[0].embed(window.exact_pixels, window.tokens[0][window.compared])
        return Embeddings(each, exact_images)

    def store_scores(
        self, window: Window, embeddings: Embeddings, facts: dict[str, Any], *, keep_embeddings: bool
    ) -> None:
        """Set the scores of a window's pairs, and add the comparison of fast decoding to the part's facts."""
        scores: list[NDArray[np.float32]] = [(images * texts).sum(-1).numpy() for images, texts in embeddings.each]
        for number, prepared in enumerate(window.encoded):
            pair, own = prepared.pair, [column[number] for column in scores]
            if not np.isfinite(own).all():
                pair.fail(Status.READ_ERROR, "the encoder gave a score that is not finite")
                continue
            pair.score = float(own[0])
            pair.extra.update({c: float(s) for c, s in zip(self.columns[1:], own[1:], strict=True)})
            if keep_embeddings:
                images, texts = embeddings.each[0]
                pair.image_embedding = images[number].numpy().astype(np.float16)
                pair.text_embedding = texts[number].numpy().astype(np.float16)
        if embeddings.exact_images is not None:
            exact = (embeddings.exact_images * embeddings.each[0][1][window.compared]).sum(-1).numpy()
            add_comparison(facts, exact, scores[0][window.compared])
