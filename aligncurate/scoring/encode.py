"""The encoders of a run: packets are copied to the device and encoded, one after another."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore
from typing import TYPE_CHECKING

import numpy as np

from aligncurate.errors import ImageError
from aligncurate.images import gpu
from aligncurate.images.decode import decode, open_image
from aligncurate.scoring.packet import EncoderInputs, Packet, Scores
from aligncurate.scoring.timing import StageClock

if TYPE_CHECKING:
    from torch import Tensor

    from aligncurate.encoders.load import Encoder

_JPEGS_PER_CALL = 128  # that a GPU decodes at once
_AHEAD = 3  # packets on the device: one is encoded while the next are copied there


class EncodeService:
    """Encodes packets on one device; may be called from several threads.

    Args:
        encoders: by the column for their scores.
        batch: pairs that are encoded at once.
        clock: measures each stage.
        keep_embeddings: return the first encoder's embeddings.
    """

    def __init__(
        self, encoders: Mapping[str, Encoder], batch: int, clock: StageClock, *, keep_embeddings: bool
    ) -> None:
        self._encoders, self._clock, self._keep = list(encoders.values()), clock, keep_embeddings
        kinds = {e.preprocess.pixels_id: e.preprocess for e in self._encoders}
        self._kind = [list(kinds).index(e.preprocess.pixels_id) for e in self._encoders]
        self.inputs = EncoderInputs(list(encoders), list(kinds.values()), [e.tokenize for e in self._encoders], batch)
        self._room = Semaphore(_AHEAD)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def submit(self, packet: Packet) -> Future[Scores]:
        """Copy a packet to the device, in the calling thread, and encode it when its turn comes."""
        self._room.acquire()
        try:
            pixels, exact, failures = self._upload(packet)
            future = self._thread.submit(self._encode, packet, pixels, exact, failures)
        except BaseException:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return future

    def close(self, *, wait: bool = True) -> None:
        """End the thread; `wait` False leaves it behind if it hangs."""
        self._thread.shutdown(wait, cancel_futures=True)

    def _upload(self, packet: Packet) -> tuple[list[Tensor], Tensor | None, dict[int, tuple[str, str]]]:
        import torch

        with self._clock.stage("copy"):
            upload = self._encoders[0].towers.upload
            pixels = [upload(torch.from_numpy(kind)) for kind in packet.pixels]
            exact = torch.from_numpy(packet.exact_pixels) if packet.exact_pixels is not None else None
        failures: dict[int, tuple[str, str]] = {}
        rows = list(packet.files)
        for start in range(0, len(rows), _JPEGS_PER_CALL):
            with self._clock.stage("decode"):
                failures |= self._decode(packet, rows[start : start + _JPEGS_PER_CALL], pixels)
        return pixels, exact, failures

    def _decode(self, packet: Packet, rows: list[int], pixels: list[Tensor]) -> dict[int, tuple[str, str]]:
        """Decode JPEGs on the GPU into `pixels`; if it refuses one, the CPU decodes them all and finds out which."""
        preprocesses = self.inputs.preprocesses
        failures = {}
        try:
            decoded = dict(
                zip(
                    rows,
                    gpu.decode_jpegs([packet.files[row] for row in rows], preprocesses, self._encoders[0].device),
                    strict=True,
                )
            )
        except RuntimeError:
            decoded = {}
            for row in rows:
                try:
                    data = packet.files[row]
                    decoded[row] = decode(data, open_image(data)[0], preprocesses, "fast")
                except ImageError as error:
                    failures[row] = (error.status, str(error))
        for row, tensors in decoded.items():
            for kind, tensor in enumerate(tensors):
                pixels[kind][row] = tensor
        return failures

    def _encode(
        self, packet: Packet, pixels: list[Tensor], exact_pixels: Tensor | None, failures: dict[int, tuple[str, str]]
    ) -> Scores:
        import torch

        tokens = [torch.from_numpy(each).long() for each in packet.tokens]
        with self._clock.stage("encode"):
            each = [
                encoder.embed(pixels[kind], ids)
                for encoder, kind, ids in zip(self._encoders, self._kind, tokens, strict=True)
            ]
            images, texts = each[0]
            exact = np.zeros(0, np.float32)
            if exact_pixels is not None:
                exact_images, _ = self._encoders[0].embed(exact_pixels, tokens[0][packet.compared])
                exact = (exact_images * texts[packet.compared]).sum(-1).numpy()
        return Scores(
            np.stack([(images * texts).sum(-1).numpy() for images, texts in each]),
            exact,
            images.numpy().astype(np.float16) if self._keep else None,
            texts.numpy().astype(np.float16) if self._keep else None,
            failures,
            min(encoder.towers.batch for encoder in self._encoders),
        )
