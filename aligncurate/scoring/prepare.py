"""One pair made ready for the encoders: its image read, measured, hashed and decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aligncurate.dataset.record import Pair, Status
from aligncurate.errors import ImageError, ShardError
from aligncurate.images import gpu
from aligncurate.images.decode import decode, open_image
from aligncurate.images.preprocess import Preprocess
from aligncurate.io import retries, storage
from aligncurate.scoring import retry
from aligncurate.scoring.options import ScoreOptions
from aligncurate.scoring.timing import StageClock
from aligncurate.sources.captions import scored_text

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class PreparedPair:
    """A pair and its inputs for the encoders.

    Attributes:
        pair: the record; its status says whether it can be scored.
        text: what is compared with the image.
        pixels: a tensor per kind of preprocessing; None if there is nothing to encode, or not yet.
        jpeg: a file for the GPU to decode, instead of pixels.
        exact_pixels: for the first encoder, decoded exactly too, to compare fast decoding with.
        taken_over: scored by an earlier run.
    """

    pair: Pair
    text: str = ""
    pixels: list[Tensor] | None = None
    jpeg: bytes | None = None
    exact_pixels: Tensor | None = None
    taken_over: bool = False

    @property
    def to_encode(self) -> bool:
        return self.pixels is not None or self.jpeg is not None


class Preparer:
    """Prepares pairs, in several threads at once.

    Args:
        score_columns: the columns that a run computes; none if images are only measured and hashed.
        preprocesses: each kind of preprocessing of the encoders.
        options: how to decode, and what to keep.
        clock: measures reading and decoding.
        image_root_changed: earlier rows were read under another image root.
    """

    def __init__(
        self,
        score_columns: Sequence[str],
        preprocesses: Sequence[Preprocess],
        options: ScoreOptions,
        clock: StageClock,
        *,
        image_root_changed: bool = False,
    ) -> None:
        self._image_root_changed = image_root_changed
        self._columns, self._preprocesses = score_columns, preprocesses
        self._options, self._clock = options, clock

    def prepare(self, pair: Pair, earlier: Mapping[str, Any] | None, compare: bool) -> PreparedPair:
        """Read, measure, hash and decode; any fault becomes the pair's status.

        Args:
            pair: as the source gives it.
            earlier: the row of an earlier run in the same place; taken over if it is of this pair and did not fail.
            compare: decode exactly too.
        """
        moved = self._image_root_changed
        if earlier is not None and retry.is_reusable(earlier, pair, image_root_changed=moved):
            retry.take_over(earlier, pair, self._columns, image_root_changed=moved)
            return PreparedPair(pair, taken_over=True)
        if self._columns:  # scoring replaces what the source has of these, `ingest` keeps it
            pair.score = pair.level = pair.image_embedding = pair.text_embedding = None
            pair.extra.update(dict.fromkeys(self._columns[1:]))
        text = scored_text(pair, self._options.score_text)
        prepared = PreparedPair(pair, text or "")
        if pair.load is not None and pair.status not in (Status.UNSAFE_PATH, Status.MULTI_IMAGE):
            try:
                self._read_image(prepared, compare)
            except ImageError as error:
                pair.fail(Status(error.status), str(error))
            except storage.TooLargeError as error:
                pair.fail(Status.TOO_LARGE, str(error))
            except (OSError, ValueError) as error:  # ValueError: an impossible file name
                _fail_reading(pair, error)
        if pair.conversations is not None and not text:
            who = self._options.score_text
            roles = ", ".join(dict.fromkeys(turn["role"] for turn in pair.conversations))
            pair.fail(
                Status.MISSING_CAPTION,
                f"the conversation has no text to score (--score-text {who}; its roles are {roles})",
            )
        if pair.status is not Status.OK:
            prepared.pixels = prepared.jpeg = prepared.exact_pixels = None
            pair.score = pair.level = pair.image_embedding = pair.text_embedding = None
        return prepared

    def _read_image(self, prepared: PreparedPair, compare: bool) -> None:
        pair, mode = prepared.pair, self._options.decode
        assert pair.load is not None
        with self._clock.stage("read"):
            data = pair.load()
        pair.load = None  # it may hold the image's bytes
        with self._clock.stage("decode"):
            pair.sha256 = hashlib.sha256(data).digest()
            if self._options.embed_images:
                pair.image = data
            image, pair.width, pair.height = open_image(data)
            if not self._columns or pair.status is not Status.OK:
                return
            if mode == "gpu" and gpu.decodable(data, image, self._preprocesses):
                for preprocess in self._preprocesses:
                    preprocess.check(*image.size)
                prepared.jpeg = data
            else:
                prepared.pixels = decode(data, image, self._preprocesses, mode)
            if compare and mode != "exact":
                prepared.exact_pixels = decode(data, open_image(data)[0], self._preprocesses[:1], "exact")[0]


def _fail_reading(pair: Pair, error: OSError | ValueError) -> None:
    """Set the status of an image that is not there, or is refused.

    Raises ShardError for what a rerun may read: a fault of the disk or network, or of a file that holds many images.
    """
    reason = getattr(error, "strerror", None) or error
    path = pair.image_path or ""
    by_name = pair.image_offset is None and (storage.is_remote(path) or path.startswith("/"))
    # An OSError without a number is about the bytes: they are not those that were scored.
    if retries.is_transient(error) or (isinstance(error, OSError) and error.errno and not by_name):
        raise ShardError(f"{path if by_name else pair.source}: cannot be read: {reason}") from None
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        pair.fail(Status.MISSING_IMAGE, f"there is no image {path}")
    else:
        pair.fail(Status.READ_ERROR, f"the image cannot be read: {reason}")
